"""Take the newest tokens back: a layer's slots as they were before these came."""

from typing import Any

import mlx.core as mx
import numpy as np

from .entries import first_slots, gather, join, to_mlx
from .journal import Evicted, Renumbered, ScoresBefore
from .slots import LAST, Slots, in_order


def can_take_back(slots: Slots, n: int) -> bool:
    """Whether the newest n tokens can be taken back exactly."""
    to, limit = slots.offset - n, slots.rule.max_size
    if n <= 0 or to <= 0:
        return True
    if slots.rule.memory and slots.journal.scores_before(to) is None:
        return False
    if not _can_rotate_back(slots, to):
        return False
    if slots.recall is not None and not slots.recall.can_go_back(to, slots.offset):
        return False
    evictions = 0 if limit is None else slots.offset - max(to, limit)
    at_hand = len(slots.journal.evicted_since(to)) + (slots.victim is not None)
    return evictions <= at_hand


def take_back(slots: Slots, n: int) -> None:
    """Be as if the newest n tokens had not come; n <= 0 takes nothing back."""
    if n <= 0:
        return
    to = slots.offset - n
    if to <= 0:
        slots.empty()
        return
    if slots.recall is not None:
        slots.recall = slots.recall.until(to)
    order = _bring_back(slots, to) if slots.evicted else None
    slots.offset, slots.victim = to, None
    if order is not None:
        slots.keep(order[..., : slots.size()])
    if (before := slots.journal.scores_before(to)) is not None:
        slots.remember(_ordered_scores(before, slots.size()))
    if (renumbered := slots.journal.renumbered_since(to)) is not None:
        _rotate_back(slots, renumbered)
    slots.journal = slots.journal.until(to)


def _can_rotate_back(slots: Slots, to: int) -> bool:
    """Whether the first renumbering that came after `to` tokens is known."""
    when, limit = slots.renumbering, slots.rule.max_size
    if when is None or limit is None:
        return True
    first = when.next_after(max(to, limit))
    known = slots.journal.renumbered_since(to)
    return first > slots.offset or (known is not None and known.step == first - 1)


def _rotate_back(slots: Slots, before: Renumbered) -> None:
    """Take a renumbering back, of the tokens that are held now."""
    assert slots.rotary is not None
    positions = slots.positions_of(slots.keys.shape[2])
    now, then = (np.array(p) for p in (positions, before.positions))
    rotary, old = np.array(slots.rotary), np.array(before.rotary)
    for place in np.ndindex(now.shape[:2]):
        found = np.searchsorted(then[place], now[place]).clip(max=then.shape[2] - 1)
        known = then[place][found] == now[place]
        # Others were evicted before it, so they have the positions of before.
        rotary[place] = np.where(known, old[place][found], rotary[place])
    slots.rotate(to_mlx(rotary))
    slots.shift = before.shift
    if not slots.shift:
        slots.rotary = slots.stored_rotary = None


def _bring_back(slots: Slots, to: int) -> mx.array:
    """Add the journal's tokens; all columns [B, H', n], those before `to` first."""
    back = slots.journal.evicted_since(to)
    # The victim was evicted at the last step, so it was there before `to`.
    n = slots.size() if slots.victim is None else slots.keys.shape[2]
    for name in Evicted._fields[1:]:
        if (entries := getattr(slots, name)) is not None:
            parts = [first_slots(entries, n), *(getattr(e, name) for e in back)]
            setattr(slots, name, join(parts))
    positions: Any = slots.positions
    return mx.argsort(mx.where(positions < to, positions, LAST), axis=-1)


def _ordered_scores(before: ScoresBefore, n: int) -> mx.array:
    """Scores [B, H', n] in order of position."""
    if before.victim is None:
        return before.scores[..., :n]
    return gather(before.scores, in_order(before.positions, before.victim, n))
