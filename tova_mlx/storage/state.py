"""A layer's slots as arrays and scalars, and back, or refused with the reason.

The journal is not part of it: tokens before a save cannot be taken back after it.
"""

import json
from typing import Any, TypeGuard

import mlx.core as mx
import numpy as np

from ..caches.refusals import check_options
from ..errors import CacheStateError
from ..policies import POLICIES, Rule, settle
from .packed import Packed, Rows, Storage, storage
from .packed import arrays as arrays_of
from .slots import Slots

_VERSION = 1
# Positions are int32, and there must be some left to go on with.
_MOST_TOKENS = 2**31 - 2**20
# What may come out of a tuple that is no state.
_WRONG = (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    OverflowError,
    RecursionError,
)


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
        keys, values, *others, offset, text = state
        config = json.loads(text)
        if config["version"] != _VERSION:
            raise ValueError(f"version {config['version']}")
        how = {name: config[name] for name in ("prefill", "shares")}
        if not isinstance(how["shares"], bool):
            raise ValueError(f"shares={how['shares']!r}")
        rule, kept = _rule(config["rule"]), _storage(config["storage"])
        check_options(rule, how["prefill"], config["journal"])
        slots = Slots(rule, config["journal"], kept)
        slots.keys = _rows(keys, kept.key_bits, kept.group_size)
        slots.values = _rows(values, kept.value_bits, kept.group_size)
        slots.positions, slots.scores, slots.norms, slots.victim = others
        if rule.reads_keys:
            # Earlier versions kept the norms of keys.
            slots.norms = None
        slots.offset = offset
        _check(slots)
    except _WRONG as error:
        raise CacheStateError(
            f"This is not the state of a tova_mlx cache ({error}). Make it again "
            "with this version."
        ) from error
    return slots, how


def _rule(given: dict[str, Any]) -> Rule:
    """The rule that its own options give, which must be all of it."""
    options = {name: given[name] for name in POLICIES[given["policy"]].options}
    rule = settle(given["policy"], given["max_size"], options)
    if rule != Rule(**given):
        raise ValueError("a rule that no options give")
    return rule


def _storage(given: list[Any]) -> Storage:
    *bits, group_size = given
    kept = storage(bits if any(b is not None for b in bits) else None, group_size)
    if [*kept] != [*given] or not isinstance(group_size, int):
        raise ValueError(f"storage {given}")
    return kept


def _plain(rows: Any) -> Any:
    """An array, or the three of packed rows."""
    return arrays_of(rows) if isinstance(rows, Packed) else rows


def _rows(state: Any, bits: int | None, group_size: int) -> Any:
    if state is None:
        return None
    parts: Any = (state,) if bits is None else state
    if isinstance(parts, mx.array) or not all(_is_array(a, 4) for a in parts):
        raise ValueError(f"no rows of {bits or 'no'} bits")
    if not mx.issubdtype(parts[-1].dtype, mx.floating):
        raise ValueError(f"rows of {parts[-1].dtype}")
    if bits is None:
        return state
    data, scales, biases = parts
    rows = Packed(data, scales, biases, bits, group_size)
    groups = (*rows.shape[:3], rows.shape[3] // group_size)
    if (
        data.dtype != mx.uint32
        or scales.dtype != biases.dtype
        or rows.shape[3] % group_size
        or scales.shape != groups
        or biases.shape != groups
    ):
        raise ValueError(f"no rows of {bits} bits in groups of {group_size}")
    return rows


def _is_array(array: Any, ndim: int) -> TypeGuard[mx.array]:
    return isinstance(array, mx.array) and array.ndim == ndim


def _check(slots: Slots) -> None:
    """ValueError unless some text could have left these slots."""
    offset = slots.offset
    if isinstance(offset, bool) or not isinstance(offset, int):
        raise ValueError(f"{offset!r} tokens seen")
    if not 0 <= offset < _MOST_TOKENS:
        raise ValueError(f"{offset} tokens seen")
    if slots.keys is None or slots.values is None:
        if offset or any(a is not None for a in slots.arrays):
            raise ValueError("no keys")
        return
    # First: nothing may be read by slot before that is known to be inside.
    _check_shapes(slots, slots.keys, slots.values)
    _check_positions(slots)
    _check_numbers(slots)


def _check_shapes(slots: Slots, keys: Rows, values: Rows) -> None:
    rule, rows = slots.rule, keys.shape[:3]
    # A model may keep values of no width, where keys say everything.
    if values.shape[:3] != rows or 0 in keys.shape:
        raise ValueError(f"keys {keys.shape}, values {values.shape}")
    types = [arrays_of(r)[-1].dtype for r in (keys, values)]
    if types[0] != types[1]:
        raise ValueError(f"keys of {types[0]}, values of {types[1]}")
    if slots.victim is not None and not slots.evicted:
        raise ValueError("a victim, but nothing was evicted")
    n, limit = rows[2], rule.max_size
    if n < slots.taken or (limit is not None and n > limit + 1):
        raise ValueError(f"{n} slots for {slots.size()} tokens")
    choosers = (rows[0], slots.choosers(keys))
    remembers = bool(rule.memory)
    # Shape, type, whether it may be there and whether it must.
    expected = {
        "positions": ((*choosers, n), mx.int32, True, slots.evicted),
        "scores": ((*choosers, n), mx.float32, remembers, remembers and slots.offset),
        "norms": (rows, mx.float32, rule.value_weighted, rule.value_weighted),
        "victim": ((*choosers, 1), mx.uint32, True, False),
    }
    for name, (shape, dtype, may, must) in expected.items():
        array = getattr(slots, name)
        if array is None and not must:
            continue
        if not _is_array(array, 3) or array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{name} are not {dtype} {list(shape)}")
        if not may:
            raise ValueError(f"{name}, but {rule.policy} has none with these options")
    # A slot number past the end would write outside the array.
    if slots.victim is not None and mx.any(slots.victim >= n).item():
        raise ValueError(f"a victim past {n} slots")


def _check_positions(slots: Slots) -> None:
    """Who is held, and whose slot is dead, must be what the rule leaves."""
    if slots.positions is None:
        return
    rule, offset, size = slots.rule, slots.offset, slots.size()
    held = np.array(slots.held_positions())
    # With the dead slot: all that were there in the last step, so the newest too.
    there = np.sort(np.array(slots.positions)[..., : slots.taken], axis=-1)
    newest = 0 if slots.victim is None else 1
    # One that goes by age leaves no choice.
    recent = size - rule.n_sinks if rule.by_age and slots.evicted else rule.n_recent
    if not (
        (np.diff(held) > 0).all()
        and (np.diff(there) > 0).all()
        and (there >= 0).all()
        and (there < offset).all()
        and _begin(held, rule.n_sinks)
        and _end(held, recent, offset)
        and _end(there, recent + newest if rule.by_age else newest, offset)
    ):
        raise ValueError(f"positions that {rule.policy} cannot leave")


def _begin(positions: Any, n: int) -> bool:
    """Whether the first n tokens, or all, are at the beginning."""
    n = min(n, positions.shape[-1])
    return bool((positions[..., :n] == np.arange(n)).all())


def _end(positions: Any, n: int, offset: int) -> bool:
    """Whether the newest n tokens of `offset`, or all, are at the end."""
    n = min(n, positions.shape[-1])
    first = positions.shape[-1] - n
    return bool((positions[..., first:] == np.arange(offset - n, offset)).all())


def _check_numbers(slots: Slots) -> None:
    """What ranks tokens, and the rows: one that is infinite spoils all that follows."""
    slot = np.arange(slots.taken)
    dead = -1 if slots.victim is None else np.array(slots.victim).astype(np.int64)
    held = slot != dead
    for name, least in (("scores", -np.inf), ("norms", 0.0)):
        if (array := getattr(slots, name)) is not None:
            known = np.array(array)[..., : slots.taken]
            if not (~held | (np.isfinite(known) & (known >= least))).all():
                raise ValueError(f"{name} that are no numbers")
    for a in (*arrays_of(slots.keys), *arrays_of(slots.values)):
        if not mx.isfinite(a[:, :, : slots.taken]).all().item():
            raise ValueError("keys or values that are no numbers")
