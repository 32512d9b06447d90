"""A layer's slots as arrays and scalars, and back, or refused with the reason.

The journal is not part of it: tokens before a save cannot be taken back after it.
"""

import json
from typing import Any

import mlx.core as mx
import numpy as np

from .errors import CacheStateError
from .packed import Packed, Storage
from .packed import arrays as arrays_of
from .policies import POLICIES, Rule, settle
from .slots import Slots

_VERSION = 1


def pack(slots: Slots, **how: Any) -> tuple[Any, ...]:
    """What mlx-lm calls `state`: arrays or None, tokens seen, and a JSON string.

    how: `prefill` and `shares`, which are not of the slots.
    """
    config = {
        "version": _VERSION,
        "rule": slots.rule.as_dict(),
        "journal": slots.journal.length,
        "storage": slots.storage,
        **how,
    }
    keys, values, *others = slots.arrays
    rows = (_plain(keys), _plain(values))
    return (*rows, *others, slots.offset, json.dumps(config))


def unpack(state: tuple[Any, ...]) -> tuple[Slots, dict[str, Any]]:
    """The slots and `how` of a `pack`.

    Raises CacheStateError for what is no such state, or cannot be one.
    """
    try:
        *arrays, offset, text = state
        config = json.loads(text)
        if config["version"] != _VERSION:
            raise ValueError(f"version {config['version']}")
        rule = Rule(**config["rule"])
        options = {o: config["rule"][o] for o in POLICIES[rule.policy].options}
        if settle(rule.policy, rule.max_size, options) != rule:
            raise ValueError("a rule that no options give")
        kept = Storage(*config["storage"])
        slots = Slots(rule, config["journal"], kept)
        keys, values, positions, scores, norms, victim = arrays
        slots.offset = offset
        slots.keys = _rows(keys, kept.key_bits, kept.group_size)
        slots.values = _rows(values, kept.value_bits, kept.group_size)
        slots.positions, slots.scores = positions, scores
        slots.norms, slots.victim = norms, victim
        _check(slots)
        return slots, {name: config[name] for name in ("prefill", "shares")}
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CacheStateError(
            f"This is not the state of a tova_mlx cache ({error}). Make it again "
            "with this version."
        ) from error


def _plain(rows: Any) -> Any:
    """An array, or the three of packed rows."""
    return arrays_of(rows) if isinstance(rows, Packed) else rows


def _rows(state: Any, bits: int | None, group_size: int) -> Any:
    if state is None or bits is None:
        if isinstance(state, (tuple, list)):
            raise ValueError("packed rows, but no bits")
        return state
    data, scales, biases = state
    rows = Packed(data, scales, biases, bits, group_size)
    groups = (*rows.shape[:3], rows.shape[3] // group_size)
    if data.dtype != mx.uint32 or scales.shape != groups or biases.shape != groups:
        raise ValueError(f"no rows of {bits} bits in groups of {group_size}")
    return rows


def _check(slots: Slots) -> None:
    """ValueError unless shapes, types and slot numbers belong together."""
    rule, keys, values = slots.rule, slots.keys, slots.values
    if not isinstance(slots.offset, int) or slots.offset < 0:
        raise ValueError(f"{slots.offset!r} tokens seen")
    if keys is None or values is None:
        if slots.offset or any(a is not None for a in slots.arrays):
            raise ValueError("no keys")
        return
    if len(keys.shape) != 4 or values.shape[:3] != keys.shape[:3]:
        raise ValueError(f"keys {keys.shape}, values {values.shape}")
    rows = keys.shape[:3]
    per_chooser = (rows[0], slots.choosers(keys), rows[2])
    limit = rule.max_size
    if rows[2] < slots.size() or (limit is not None and rows[2] > limit + 1):
        raise ValueError(f"{rows[2]} slots for {slots.size()} tokens")
    expected = {
        "positions": (slots.positions, per_chooser, mx.int32, slots.evicted),
        "scores": (slots.scores, per_chooser, mx.float32, rule.memory and slots.offset),
        "norms": (slots.norms, rows, mx.float32, rule.keeps_norms),
        "victim": (slots.victim, (*per_chooser[:2], 1), mx.uint32, False),
    }
    for name, (array, shape, dtype, needed) in expected.items():
        if array is None and not needed:
            continue
        if array is None or array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{name} are not {dtype} {list(shape)}")
    # A slot number past the end would write outside the array.
    if slots.victim is not None and mx.any(slots.victim >= rows[2]).item():
        raise ValueError(f"a victim past {rows[2]} slots")
    held = np.array(slots.held_positions())
    if not (np.diff(held) > 0).all() or not (held < slots.offset).all():
        raise ValueError("positions that no prompt gives")
