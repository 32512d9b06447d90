"""Slots whose evicted tokens are told to a journal, a recall and an observer."""

from typing import Any

import mlx.core as mx
import numpy as np

from ..policies import Rule
from .archive import Rows
from .entries import after, arrays_of, each, first_slots, gather, to_mlx
from .fields import SlotFields, tokens_held
from .formats import PLAIN, Storage
from .journal import Evicted, Journal, ScoresBefore
from .metal import take_slots
from .observer import Observer
from .recall import Recall
from .rotation import Renumbering


class LoggedSlots(SlotFields):
    """Slots, and who wants to know what is evicted from them.

    Attributes:
        offset: tokens seen.
        journal: what the last steps destroyed.
        observer: who is told what is evicted.
        recall: what of the evicted is attended to, or None.
    """

    def __init__(
        self,
        rule: Rule,
        journal: int = 0,
        storage: Storage = PLAIN,
        renumbering: Renumbering | None = None,
        recall: Recall | None = None,
    ):
        super().__init__(rule, storage, renumbering)
        self.offset = 0
        self.journal, self.recall = Journal(journal), recall
        self.observer = Observer()

    def size(self) -> int:
        """Tokens held."""
        return tokens_held(self.offset, self.rule.max_size)

    @property
    def newest(self) -> int:
        """The position of the newest token."""
        return self.offset - 1

    @property
    def logs(self) -> bool:
        """Whether anybody asks which columns a block evicts."""
        return bool(self.journal.length or self.observer or self.recall)

    def log_evicted(
        self,
        columns: mx.array,
        *,
        once: bool = False,
        scores: mx.array | None = None,
    ) -> None:
        """Log the columns [B, H', n] that a block evicts, in order of step.

        Before `keep`; the last of them is evicted at the newest token's step. once:
        all are, and the journal cannot bring them back. scores: those that they were
        evicted with, for an observer who wants them.
        """
        n = columns.shape[2]
        if n and self.observer:
            steps = [self.newest] * n if once else range(self.offset - n, self.offset)
            self.observer.evicted(steps, gather(self.positions, columns), scores)
        if n and self.recall is not None:
            there = (self.keys, self.values, self.positions)
            self._log_for_recall(Rows(*(gather(e, columns) for e in there)))
        n = 0 if once else min(self.journal.length, n)
        if n:
            late = columns[..., -n:]
            there = self._to_log(self.positions)
            self._log([None if e is None else gather(e, late) for e in there])

    def _log_victim(self) -> None:
        if self.victim is None or not (self.journal.length or self.recall is not None):
            return
        limit = self.rule.max_size
        assert limit is not None
        if self.rule.by_age:
            # Known without those of all slots, which would have to be made.
            logged = take_slots(self._to_log(None), self.victim)
            oldest = self.newest - (limit - self.rule.n_sinks)
            logged[2] = to_mlx(np.full(self.victim.shape, oldest, np.int32))
        else:
            logged = take_slots(self._to_log(self.positions), self.victim)
        if self.journal.length:
            self._log(logged)
        if self.recall is not None:
            self._log_for_recall(Rows(*logged[:3]))
        read = [a for part in logged for a in arrays_of(part)]
        # Read before the slot is written: a read that waits turns the write in place
        # into a copy.
        self.keys, self.values = after(self.keys, read), after(self.values, read)

    def _log_scores(self) -> None:
        if self.scores is None or not self.journal.length or not self.offset:
            return
        if self.victim is None:
            scores = first_slots(self.scores, self.size())
            before = ScoresBefore(self.offset, scores)
        else:
            known = (self.scores, self.positions, self.victim)
            before = ScoresBefore(self.offset, *known)
        self.journal = self.journal.with_scores(before)

    def _to_log(self, positions: mx.array | None) -> list[Any]:
        """What the journal keeps of a token, of all slots."""
        there = [self.keys, self.values, positions, self.value_norms]
        if self.renumbering is not None:
            rotary = self.positions if self.rotary is None else self.rotary
            stored = rotary if self.stored_rotary is None else self.stored_rotary
            there += [rotary, stored if self.keeps_stored else None]
        return there

    def _log(self, logged: list[Any]) -> None:
        """Into the journal with n tokens of `_to_log`, the last of the last step."""
        n = logged[0].shape[2]
        first = self.offset - n
        self.journal = self.journal.with_evicted(
            *(Evicted(first + i, *(_token(e, i) for e in logged)) for i in range(n))
        )

    def _log_for_recall(self, rows: Rows) -> None:
        """Give tokens, in order of step, to the recall."""
        assert self.recall is not None
        self.recall = self.recall.with_evicted(rows)


def _token(entries: Any, i: int) -> Any:
    return None if entries is None else each(lambda a: a[:, :, i : i + 1], entries)
