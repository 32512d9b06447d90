"""The page of an inspection: one HTML file with all its data in it.

`page.html` beside this file is the page; a number for each token, layer and KV head is
put into it in base64, steps in 16 bits where they fit (else 32), scores rounded to 16
bits (three digits).
"""

from __future__ import annotations

import json
from base64 import b64encode
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import EvaluationError
from ..files import written_whole
from ..policies import RECALL_BLOCK

if TYPE_CHECKING:
    from .record import Inspection, Recalled, Record

_PAGE = Path(__file__).with_name("page.html")
_SHORT = 2**16 - 1
_GREATEST = float(np.finfo(np.float16).max)


def html(inspection: Inspection) -> str:
    """Return the page's text."""
    page = _PAGE.read_text("utf-8")
    text = json.dumps(_data(inspection), ensure_ascii=False, separators=(",", ":"))
    # A text may say </script>, or begin a comment of HTML.
    safe = text.replace("<", "\\u003c")
    # Half of a surrogate pair has no place in a file.
    safe = safe.encode("utf-8", "replace").decode()
    head, tail = page.split("__DATA__")
    return head + safe + tail


def write(inspection: Inspection, path: Path) -> Path:
    """Write the page to a file, all of it or nothing.

    Raises EvaluationError if it cannot be written; what was there stays.
    """
    try:
        with written_whole(path) as written:
            written.write_text(html(inspection), encoding="utf-8")
    except OSError as error:
        raise EvaluationError(
            f"{path}: cannot be written ({error.strerror}). Name a file in a directory "
            "that can be written to."
        ) from error
    return path


def _data(inspection: Inspection) -> dict[str, Any]:
    n = len(inspection.ids)
    counts = np.bincount(inspection.pieces.piece_of)
    return {
        "model": inspection.model,
        "n": n,
        "block": RECALL_BLOCK,
        "wide": n >= _SHORT,
        "pieces": inspection.pieces.texts,
        # Of how many tokens a piece is, where it is more than one.
        "many": [[int(i), int(counts[i])] for i in np.flatnonzero(counts > 1)],
        "special": sorted(inspection.pieces.special),
        "settings": [_setting(record, n) for record in inspection.records],
    }


def _setting(record: Record, n: int) -> dict[str, Any]:
    steps = np.uint32 if n >= _SHORT else np.uint16
    layers = record.layers
    recall = None
    if any(layer.recalled for layer in layers):
        recall = {
            name: _coded(
                np.stack([_recalled(layer.recalled, name, n) for layer in layers]),
                steps,
            )
            for name in ("first", "last", "times")
        }
        recall |= _blocks([layer.recalled for layer in layers])
    return {
        "label": record.label,
        "policy": record.policy,
        "layers": [layer.layer for layer in layers],
        "heads": [len(layer.evicted) for layer in layers],
        "steps": _coded(np.concatenate([r.evicted for r in layers]), steps),
        "scores": _scores(record),
        "recall": recall,
    }


def _recalled(recalled: Any, name: str, n: int) -> npt.NDArray[np.int32]:
    """A layer's numbers; a step that never was comes after all."""
    if recalled is None:
        return np.full(n, 0 if name == "times" else n, np.int32)
    values = getattr(recalled, name)
    return np.where(values < 0, n, values)


def _blocks(layers: list[Recalled | None]) -> dict[str, Any]:
    """What each token could read in each layer, `width` numbers for a token."""
    there = [layer.blocks for layer in layers if layer is not None]
    width = max(blocks.shape[1] for blocks in there)
    whole = np.full((len(layers), len(there[0]), width), -1, np.int32)
    for place, layer in zip(whole, layers, strict=True):
        if layer is not None:
            place[:, : layer.blocks.shape[1]] = layer.blocks
    dtype = np.uint8 if whole.max(initial=0) < 2**8 - 1 else np.uint16
    # None is the greatest number that there is.
    none = np.iinfo(dtype).max
    blocks = _coded(np.where(whole < 0, none, whole), dtype)
    return {"blocks": blocks, "width": width, "short": dtype is np.uint8}


def _scores(record: Record) -> str | None:
    """Those of all layers, or None if no layer has any."""
    if all(layer.scores is None for layer in record.layers):
        return None
    parts = [
        np.full(r.evicted.shape, np.nan, np.float32) if r.scores is None else r.scores
        for r in record.layers
    ]
    return _coded(np.concatenate(parts).clip(-_GREATEST, _GREATEST), np.float16)


def _coded(values: npt.NDArray[Any], dtype: Any) -> str:
    little = np.dtype(dtype).newbyteorder("<")
    return b64encode(np.ascontiguousarray(values, little).tobytes()).decode()
