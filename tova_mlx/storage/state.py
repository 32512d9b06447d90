"""A layer's slots as arrays and scalars, and back, or refused with the reason.

The journal is not part of it: tokens before a save cannot be taken back after it.
"""

import json
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import CacheStateError, reason_of
from ..policies import POLICIES, Rule, resolve_options
from .entries import Entries, first_slots, gather, is_plain
from .fields import positions_by_age
from .formats import Storage
from .recall_state import empty_recall, fill_recall, recall_to_state
from .rotation import Renumbering
from .slots import Slots
from .state_entries import check_finite, from_arrays, is_array, is_count, to_arrays

_VERSION = 1
# What may come out of a tuple that is not a state.
_WRONG = (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    OverflowError,
    RecursionError,
)


def to_state(slots: Slots, rule: Rule, **how: Any) -> tuple[Any, ...]:
    """Return what mlx-lm calls `state`: arrays or None, tokens seen, a JSON string.

    rule: that of the cache, before a conversation pinned its first tokens; how:
    `prefill` and `shares`, which are not of the slots.
    """
    config = {
        "version": _VERSION,
        "rule": rule.as_dict(),
        "journal": slots.journal.length,
        "storage": slots.storage.as_json(),
        **how,
    }
    keys, values, *others, rotary, stored, victim = slots.arrays
    if slots.renumbering is not None:
        config["renumbering"] = slots.renumbering.as_json()
        config["shift"] = slots.shift
        others += [rotary, stored]
    if slots.recall is not None:
        arrays, config["recall"] = recall_to_state(slots.recall)
        others.append(arrays)
    if slots.rule.pinned:
        config["pinned"] = slots.rule.pinned
    entries = (to_arrays(keys), to_arrays(values))
    return (*entries, *others, victim, slots.offset, json.dumps(config))


def from_state(state: tuple[Any, ...]) -> tuple[Slots, dict[str, Any]]:
    """Return the slots, and `rule` and `how` of a `to_state`.

    Raises CacheStateError for what is not such a state, or cannot be one.
    """
    try:
        keys, values, *others, offset, text = state
        config = json.loads(text)
        if config["version"] != _VERSION:
            raise ValueError(f"version {config['version']}")
        how = {name: config[name] for name in ("prefill", "shares")}
        if not isinstance(how["shares"], bool):
            raise ValueError(f"shares={how['shares']!r}")
        rule = how["rule"] = _rule(config["rule"])
        if (pinned := config.get("pinned", 0)) != 0:
            rule = rule.pinning(pinned)
            if rule.pinned != pinned:
                raise ValueError(f"{pinned!r} pinned tokens")
        stored = Storage.from_json(config["storage"])
        renumbering = config.get("renumbering")
        if renumbering is not None:
            renumbering = Renumbering.from_json(renumbering)
        recall, kept = config.get("recall"), None
        if recall is not None:
            *others, kept, victim = others
            others.append(victim)
            recall = empty_recall(recall, rule.max_size, config["journal"])
        slots = Slots(rule, config["journal"], stored, renumbering, recall)
        slots.keys = from_arrays(keys, stored.keys)
        slots.values = from_arrays(values, stored.values)
        slots.positions, slots.scores, slots.value_norms, *others, slots.victim = others
        if renumbering is not None:
            slots.rotary, slots.stored_rotary = others
            slots.shift = config["shift"]
        elif others:
            raise ValueError("rotary positions, but nothing is renumbered")
        if rule.score is not None:
            # Earlier versions kept the norms of keys.
            slots.value_norms = None
        slots.offset = offset
        _check(slots)
        if rule.by_age and not slots.evicted:
            # Rows of a batch had them; they are those of the slots.
            slots.positions = None
        elif rule.by_age and slots.victim is not None:
            slots.written = _written_last(slots)
        if recall is not None and slots.keys is not None:
            slots.recall = fill_recall(recall, kept, slots)
    except _WRONG as error:
        raise CacheStateError(
            f"This is not the state of a tova_mlx cache ({reason_of(error)}). Make it "
            "again with this version."
        ) from error
    return slots, how


def _rule(given: dict[str, Any]) -> Rule:
    """The rule that its own options give, which must be all of it."""
    name = given["policy"]
    if isinstance(name, str) and name not in POLICIES:
        raise CacheStateError(
            f"The cache was made with policy {name[:80]!r}, which is not known here. "
            "Install the package that has it, or use register_policy."
        )
    options = {option: given[option] for option in POLICIES[name].options or ()}
    rule = resolve_options(name, given["max_size"], options)
    if rule.as_dict() != given:
        raise ValueError("a rule that no options give")
    return rule


def _check(slots: Slots) -> None:
    """Raise ValueError unless reading some text could have made these slots."""
    offset = slots.offset
    if not is_count(offset):
        raise ValueError(f"{offset!r} tokens seen")
    if slots.keys is None or slots.values is None:
        if offset or any(a is not None for a in slots.arrays):
            raise ValueError("no keys")
        return
    # First: nothing may be read by slot before that is known to be inside.
    _check_shapes(slots, slots.keys, slots.values)
    _check_positions(slots)
    _check_rotary(slots)
    _check_numbers(slots)


def _check_shapes(slots: Slots, keys: Entries, values: Entries) -> None:
    rule, shape = slots.rule, keys.shape[:3]
    if not slots.offset:
        raise ValueError("keys, but no tokens were seen")
    # A model may keep values of no width, where keys say everything.
    if values.shape[:3] != shape or 0 in keys.shape:
        raise ValueError(f"keys {keys.shape}, values {values.shape}")
    rotation = slots.renumbering and slots.renumbering.rotation
    if rotation and rotation.dims > keys.shape[3]:
        raise ValueError(f"a rotation of {rotation.dims} numbers of {keys.shape[3]}")
    plain = [e for e in (keys, values) if is_plain(e)]
    if len({e.dtype for e in plain}) > 1:
        raise ValueError(" and ".join(f"entries of {e.dtype}" for e in plain))
    if slots.victim is not None and not slots.evicted:
        raise ValueError("a victim, but nothing was evicted")
    n, limit = shape[2], rule.max_size
    if n < slots.taken or (limit is not None and n > limit + 1):
        raise ValueError(f"{n} slots for {slots.size()} tokens")
    heads = (shape[0], slots.eviction_heads(keys))
    remembers, moved = bool(rule.memory), bool(slots.shift)
    # Shape, type, whether it may be there and whether it must.
    expected = {
        "positions": ((*heads, n), mx.int32, True, slots.evicted),
        "scores": ((*heads, n), mx.float32, remembers, remembers and slots.offset),
        "value_norms": (shape, mx.float32, rule.value_weighted, rule.value_weighted),
        "rotary": ((*heads, n), mx.int32, moved, moved),
        "stored_rotary": ((*heads, n), mx.int32, *[slots.keeps_stored and moved] * 2),
        "victim": ((*heads, 1), mx.uint32, True, False),
    }
    for name, (shape, dtype, may, must) in expected.items():
        array = getattr(slots, name)
        if array is None and not must:
            continue
        if not is_array(array, shape, dtype):
            raise ValueError(f"{name} are not {dtype} {list(shape)}")
        if not may:
            raise ValueError(f"{name}, but {rule.policy} has none with these options")
    # A slot number past the end would write outside the array.
    if slots.victim is not None and mx.any(slots.victim >= n).item():
        raise ValueError(f"a victim past {n} slots")


def _check_positions(slots: Slots) -> None:
    """Which tokens are held, and which is the victim, must be what the rule does."""
    if slots.positions is None:
        return
    rule, offset, size = slots.rule, slots.offset, slots.size()
    held = np.array(slots.held_positions())
    # With the victim: all that were there in the last step, so the newest too.
    there = np.sort(np.array(slots.positions)[..., : slots.taken], axis=-1)
    newest = 0 if slots.victim is None else 1
    # One that evicts by age leaves no choice.
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
        raise ValueError(f"positions that {rule.policy} cannot hold")


def _written_last(slots: Slots) -> int:
    """Return the slot of the newest token, of a rule that evicts by age."""
    assert slots.positions is not None
    assert slots.victim is not None
    positions = np.array(slots.positions)
    written = int(positions[0, 0].argmax())
    n = positions.shape[2]
    there = positions_by_age(slots.rule, n, slots.newest, written)
    victims = np.array(slots.victim)
    if (positions != there).any() or (victims != slots.slot_after(written)).any():
        raise ValueError(f"slots that {slots.rule.policy} does not fill like that")
    return written


def _check_rotary(slots: Slots) -> None:
    """Rotary positions follow the order of tokens, and the newest has the last."""
    shift, when = slots.shift, slots.renumbering
    if isinstance(shift, bool) or not isinstance(shift, int):
        raise ValueError(f"rotary positions that are {shift!r} behind")
    if not shift:
        return
    if when is None or not slots.evicted or not 0 < shift <= slots.offset:
        raise ValueError(f"rotary positions that are {shift} behind")
    # The last renumbering left as many as are held.
    if slots.next_rotary - slots.size() > when.period:
        raise ValueError("rotary positions that are too far on")
    order = slots.order()
    rotary, positions = (
        np.array(first_slots(a, slots.size()) if order is None else gather(a, order))
        for a in (slots.rotary, slots.positions)
    )
    # The tokens seen since then.
    late = positions >= shift + slots.size()
    if not (
        (np.diff(rotary) > 0).all()
        and (rotary >= 0).all()
        and (rotary < slots.next_rotary).all()
        and (rotary[late] == positions[late] - shift).all()
    ):
        raise ValueError("rotary positions that no renumbering gives")


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
    """What ranks tokens, and entries: an infinite one spoils all that follows."""
    if slots.value_norms is not None:
        # The victim's too: it comes back if the newest token is taken back.
        norms = np.array(slots.value_norms)[..., : slots.taken]
        if not (np.isfinite(norms) & (norms >= 0)).all():
            raise ValueError("value_norms that are not numbers")
    if slots.scores is not None:
        slot = np.arange(slots.taken)
        victim = -1 if slots.victim is None else np.array(slots.victim).astype(np.int64)
        scores = np.array(slots.scores)[..., : slots.taken]
        if not ((slot == victim) | np.isfinite(scores)).all():
            raise ValueError("scores that are not numbers")
    check_finite(slots.keys, slots.taken)
    check_finite(slots.values, slots.taken)
