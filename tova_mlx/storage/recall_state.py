"""A layer's recall as arrays and scalars, and back, or refused with the reason.

What it knows follows from what was seen: each token is held, in the archive or waits
for it, once; so does the number of rows in each place.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..policies import RECALL_BLOCK
from .archive import Archive, Rows
from .entries import first_slots
from .formats import Storage
from .recall import Recall
from .state_entries import check_finite, from_arrays, is_array, to_arrays

if TYPE_CHECKING:
    from .slots import Slots


def recall_to_state(recall: Recall) -> tuple[Any, dict[str, Any]]:
    """Return arrays, nested, and what JSON can hold."""
    archive, waiting = recall.archive, recall.waiting
    rows: Any = (None, None, None)
    if isinstance(archive, Archive) and archive.held:
        rows = tuple(map(to_arrays, archive.rows()))
    held = None if waiting is None else tuple(map(to_arrays, waiting))
    arrays = (rows, held)
    config = {
        "slots": recall.slots,
        "archived": archive.storage.as_json(),
        "period": recall.period,
        "lost": archive.lost if isinstance(archive, Archive) else None,
    }
    return arrays, config


def empty_recall(config: Any, limit: Any, journal: int) -> Recall:
    """Return the recall of a `recall_to_state` without its arrays.

    limit: tokens held before one is evicted. Raises ValueError, TypeError, LookupError.
    """
    slots = config["slots"]
    if type(slots) is not int or slots <= 0 or slots % RECALL_BLOCK or limit is None:
        raise ValueError(f"{slots!r} slots for recall")
    period = config["period"]
    if type(period) is not int or not 0 < period < 2**31:
        raise ValueError(f"rows archived every {period!r} tokens")
    lost = config["lost"]
    if lost is None:
        raise ValueError(
            "it has an archive on disk, which tova_mlx.save_prompt_cache saves too"
        )
    if type(lost) is not int or lost < 0:
        raise ValueError(f"{lost!r} rows lost")
    archive = Archive(Storage.from_json(config["archived"]), lost=lost)
    return Recall(slots, limit, archive, journal, period)


def fill_recall(recall: Recall, arrays: Any, slots: Slots) -> Recall:
    """Return a recall with the arrays of a `recall_to_state`.

    slots: of the layer, checked.

    Raises ValueError, TypeError: no reading of a text could have made it.
    """
    (keys, values, positions), waiting = arrays
    empty = recall.archive
    assert isinstance(empty, Archive)
    # What went to the archive when rows last could.
    flushed = slots.offset // recall.period * recall.period
    count = max(0, flushed - 1 - recall.first)
    left = slots.offset - recall.first - count - (slots.victim is not None)
    if empty.lost > count:
        raise ValueError(f"{empty.lost} rows lost of {count}")
    archive = replace(empty, count=count)
    if archive.held:
        stored = empty.storage
        archive = replace(
            archive,
            keys=from_arrays(keys, stored.keys),
            values=from_arrays(values, stored.values),
            positions=positions,
        )
        _check_archive(archive, slots)
    elif any(a is not None for a in (keys, values, positions)):
        raise ValueError("an archive, but there is nothing in it")
    rows = _rows(waiting, slots, max(0, left))
    _check_together(archive, rows, slots)
    return replace(
        recall,
        archive=archive,
        waiting=rows,
    )


def _rows(state: Any, slots: Slots, n: int) -> Rows | None:
    """The n rows that wait."""
    if state is None or not n:
        if state is not None or n:
            raise ValueError(f"not {n} rows")
        return None
    keys, values, positions = state
    stored = slots.storage
    rows = Rows(
        from_arrays(keys, stored.keys), from_arrays(values, stored.values), positions
    )
    batch, heads = slots.keys.shape[:2]
    for given, own in ((rows.keys, slots.keys), (rows.values, slots.values)):
        if tuple(given.shape) != (batch, heads, n, own.shape[3]):
            raise ValueError(f"rows {list(given.shape)}")
    shape = (batch, slots.eviction_heads(slots.keys), n)
    if not is_array(positions, shape, mx.int32):
        raise ValueError(f"positions of rows are not {mx.int32} {list(shape)}")
    check_finite(rows.keys, n)
    check_finite(rows.values, n)
    return rows


def _check_archive(archive: Archive, slots: Slots) -> None:
    batch, heads = slots.keys.shape[:2]
    n = archive.held
    for stored, own in ((archive.keys, slots.keys), (archive.values, slots.values)):
        if tuple(stored.shape) != (batch, heads, n, own.shape[3]):
            raise ValueError(f"an archive of {list(stored.shape)}")
    shape = (batch, slots.eviction_heads(slots.keys), n)
    if not is_array(archive.positions, shape, mx.int32):
        raise ValueError(f"positions archived are not {mx.int32} {list(shape)}")
    check_finite(archive.keys, n)
    check_finite(archive.values, n)


def _check_together(archive: Archive, waiting: Rows | None, slots: Slots) -> None:
    """Every token seen is in one place, but for those lost."""
    positions = first_slots(slots.positions_of(slots.keys.shape[2]), slots.taken)
    known = [np.array(positions)]
    if waiting is not None:
        known.append(np.array(waiting.positions))
    if archive.held:
        known.append(np.array(archive.rows().positions))
    for place in np.ndindex(known[0].shape[:2]):
        found = np.sort(np.concatenate([part[place] for part in known]))
        if (
            len(found) != slots.offset - archive.lost
            or not (np.diff(found) > 0).all()
            or not ((found >= 0) & (found < slots.offset)).all()
        ):
            raise ValueError("tokens that are in no place, or in several")
