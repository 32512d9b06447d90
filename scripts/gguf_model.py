"""A GGUF file as a directory for `mlx_lm.load`: config, weights, tokenizer, template.

For the architectures and tokenizers of the demo models. Needs the package `gguf` (extra
`demo`).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tova_mlx.errors import reason_of
from tova_mlx.progress import Bar

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import PreTokenizer


class GGUFError(Exception):
    """A file cannot be converted; the message says why, and what to do."""


@dataclass(frozen=True)
class Architecture:
    """What a GGUF file of an architecture leaves unsaid."""

    model_class: str
    interleaved: bool  # llama.cpp interleaves the two halves that RoPE pairs
    has_bos: bool  # whether the tokenizer knows a token that begins a text
    more_eos: tuple[str, ...] = ()  # what ends an answer beside the file's own token


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", interleaved=True, has_bos=True),
    "qwen2": Architecture(
        "Qwen2ForCausalLM",
        interleaved=False,
        has_bos=False,
        more_eos=("<|endoftext|>",),
    ),
}
NAMES = {
    "output": "model.embed_tokens",  # tied
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
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # gguf's types of tokens that are not text
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def convert(gguf: Path, target: Path, dtype: type[np.floating]) -> None:
    """Write config, weights, tokenizer and chat template of a GGUF file.

    Raises GGUFError, OSError, RuntimeError.
    """
    try:
        write_model(reader_of(gguf), target, dtype)
    except Exception as error:
        # RuntimeError is how MLX says that it cannot write a file.
        if isinstance(error, (GGUFError, OSError)) or type(error) is RuntimeError:
            raise
        # Anything may come out of a damaged file.
        raise GGUFError(
            f"{gguf.name} is not a whole GGUF file of a known model "
            f"({reason_of(error)}). Get it again."
        ) from error


def reader_of(gguf: Path) -> "GGUFReader":
    """Read what a GGUF file says of itself, no further than it goes."""
    from gguf import GGUFReader

    class Reader(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **o: Any):
            # Past the end there is nothing, as often as a count in the file says.
            n = int(count) * np.dtype(dtype).itemsize
            if offset + n > len(self.data):
                raise GGUFError(f"{gguf.name} is cut off. Get it again.")
            return super()._get(offset, dtype, count, *order, **o)

    return Reader(gguf)


def write_model(reader: "GGUFReader", target: Path, dtype: type[np.floating]) -> None:
    fields = {name: f.contents() for name, f in reader.fields.items()}
    name = fields["general.architecture"]
    about = ARCHITECTURES[name]
    tokens = fields["tokenizer.ggml.tokens"]
    eos = [fields["tokenizer.ggml.eos_token_id"], *map(tokens.index, about.more_eos)]
    config = {
        "model_type": name,
        "architectures": [about.model_class],
        "hidden_size": fields[f"{name}.embedding_length"],
        "num_hidden_layers": fields[f"{name}.block_count"],
        "intermediate_size": fields[f"{name}.feed_forward_length"],
        "num_attention_heads": fields[f"{name}.attention.head_count"],
        "num_key_value_heads": fields[f"{name}.attention.head_count_kv"],
        "rms_norm_eps": fields[f"{name}.attention.layer_norm_rms_epsilon"],
        "rope_theta": fields[f"{name}.rope.freq_base"],
        "max_position_embeddings": fields[f"{name}.context_length"],
        "vocab_size": len(tokens),
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": eos if about.more_eos else eos[0],
        "tie_word_embeddings": True,
    }
    heads = {}
    if about.interleaved:
        heads = {
            "attn_q": config["num_attention_heads"],
            "attn_k": config["num_key_value_heads"],
        }
    write_weights(reader, heads, target, dtype)
    write_tokenizer(fields, about, target)
    (target / "config.json").write_text(json.dumps(config, indent=1))


def write_weights(
    reader: "GGUFReader",
    interleaved: dict[str, int],
    target: Path,
    dtype: type[np.floating],
) -> None:
    """Write the weights; `interleaved` has the heads of tensors whose rows are so."""
    import mlx.core as mx
    from gguf import dequantize

    weights = {}
    names = {tensor.name for tensor in reader.tensors}
    with Bar(len(names), "Converting", unit="tensors") as bar:
        for tensor in reader.tensors:
            bar.advance(1)
            if tensor.name == "token_embd.weight" and "output.weight" in names:
                continue  # the same numbers, more coarsely quantised
            *block, kind, part = tensor.name.split(".")
            array = dequantize(tensor.data, tensor.tensor_type)
            if kind in interleaved:
                array = unpermute(array, interleaved[kind])
            prefix = f"model.layers.{block[1]}." if block else ""
            weights[f"{prefix}{NAMES[kind]}.{part}"] = mx.array(array.astype(dtype))
    mx.save_safetensors(
        str(target / "model.safetensors"), weights, metadata={"format": "mlx"}
    )


def unpermute(array: np.ndarray, n_heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of the two halves that RoPE pairs."""
    rows, columns = array.shape
    pairs = array.reshape(n_heads, rows // n_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def write_tokenizer(fields: dict[str, Any], about: Architecture, target: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    tokens = fields["tokenizer.ggml.tokens"]
    kinds = fields["tokenizer.ggml.token_type"]
    kind_of = dict(zip(tokens, kinds, strict=True))
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"]]
    vocabulary = {t: i for i, t in enumerate(tokens) if kind_of[t] != UNUSED}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    if fields["tokenizer.ggml.pre"] == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer(fields["tokenizer.ggml.pre"])
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in kind_of.items():
        if kind in (CONTROL, USER_DEFINED):
            special = kind == CONTROL
            added = AddedToken(token, special=special, normalized=False)
            tokenizer.add_tokens([added])
    tokenizer.save(str(target / "tokenizer.json"))

    def token_of(role: str) -> str | None:
        index = fields.get(f"tokenizer.ggml.{role}_token_id")
        return None if index is None else tokens[index]

    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token_of("bos") if about.has_bos else None,
        "eos_token": token_of("eos"),
        "unk_token": token_of("unknown"),
        "pad_token": token_of("padding"),
        "chat_template": fields["tokenizer.chat_template"],
        "model_max_length": fields[f"{fields['general.architecture']}.context_length"],
        "clean_up_tokenization_spaces": False,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def pre_tokenizer(name: str) -> "PreTokenizer":
    """Return what llama.cpp means by a name: how a text is split before merging."""
    from tokenizers import Regex, pre_tokenizers

    if name == "smollm":
        split = pre_tokenizers.Digits(individual_digits=True)
    elif name == "qwen2":
        split = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated")
    else:
        raise GGUFError(f"the tokenizer {name} is not known here.")
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=name == "smollm"
    )
    return pre_tokenizers.Sequence([split, byte_level])
