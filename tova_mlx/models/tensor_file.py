"""A safetensors file, looked at before MLX reads it: is it whole, and does it fit?

MLX takes tensors that share their bytes, allocating for each, and ends the process at
one of hundreds of dimensions: what a header says is compared with the file here. A file
can also have a checksum of all of it, so that not one changed bit goes unnoticed.
"""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

# What stands for a checksum while it is made.
UNSUMMED = "0" * 64
_MOST_HEADER = 100_000_000
_MOST_DIMENSIONS = 8
_LARGEST = 2**31 - 1
_CHUNK = 1 << 20
# Bytes of a number.
_SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


class Header(NamedTuple):
    """The names of the arrays in a file, and its metadata."""

    names: list[str]
    metadata: dict[str, str]


def check(path: str | os.PathLike[str]) -> Header:
    """Return what a file's header says.

    Raises ValueError, OSError, RecursionError: it is not that of this file.
    """
    size, raw = os.path.getsize(path), _raw_header(path)
    header = json.loads(raw, object_pairs_hook=_each_once)
    if not isinstance(header, dict):
        raise ValueError("a header that names no arrays")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(text, str) for text in metadata.values()
    ):
        raise ValueError("metadata that are not texts")
    end = 0
    for start, stop in sorted(_span(name, given) for name, given in header.items()):
        if start != end:
            raise ValueError("arrays that share bytes, or leave some out")
        end = stop
    if 8 + len(raw) + end != size:
        raise ValueError(f"{size} bytes, but its header says {8 + len(raw) + end}")
    return Header(list(header), metadata)


def write_sum(path: str | os.PathLike[str], name: str) -> None:
    """Put the checksum of a file where its metadata have `UNSUMMED` under a name."""
    at = _place_of(path, name, UNSUMMED)
    digest = _sum(path, at).encode()
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(digest)


def check_sum(path: str | os.PathLike[str], name: str, told: str) -> None:
    """Raise ValueError, OSError unless a file is as when it got this checksum."""
    if len(told) != len(UNSUMMED) or _sum(path, _place_of(path, name, told)) != told:
        raise ValueError("its checksum is wrong")


def _raw_header(path: str | os.PathLike[str]) -> bytes:
    with open(path, "rb") as file:
        n = int.from_bytes(file.read(8), "little")
        if n > min(_MOST_HEADER, os.fstat(file.fileno()).st_size - 8):
            raise ValueError("cut off within its header")
        return file.read(n)


def _span(name: str, given: Any) -> tuple[int, int]:
    """Where an array's bytes are. Raises ValueError."""
    shape, (start, stop) = given["shape"], given["data_offsets"]
    if len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"{name[:80]} has {len(shape)} dimensions")
    if not all(type(n) is int and 0 <= n <= _LARGEST for n in shape):
        raise ValueError(f"{name[:80]} has a shape that is not one")
    taken = _SIZES[given["dtype"]] * math.prod(shape)
    if type(start) is not int or type(stop) is not int or stop - start != taken:
        raise ValueError(f"{name[:80]} has other bytes than its shape takes")
    return start, stop


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name that is there twice")
    return found


def _place_of(path: str | os.PathLike[str], name: str, text: str) -> int:
    """Where in a file the metadata's text of this name begins."""
    before = f'{name}":"'.encode()
    at = _raw_header(path).find(before + text.encode() + b'"')
    if at < 0:
        raise ValueError("its checksum is not where it was written")
    return 8 + at + len(before)


def _sum(path: str | os.PathLike[str], at: int) -> str:
    """The checksum of a file whose own, from there on, counts as `UNSUMMED`."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        digest.update(file.read(at))
        digest.update(UNSUMMED.encode())
        file.seek(at + len(UNSUMMED))
        while part := file.read(_CHUNK):
            digest.update(part)
    return digest.hexdigest()
