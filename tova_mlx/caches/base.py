"""What a layer's cache and a batch's have in common: update, then attend.

A model stores new keys and values in a cache, and then attends to what the cache gave.
A policy that ranks by more than age needs both, so an update that nobody attended to
must not go by unnoticed.
"""

import sys
from typing import Any, NamedTuple

import mlx.core as mx

from ..attention.arguments import AttentionArgs
from ..attention.sharing import Shared
from ..policies import Rule
from ..storage.entries import Entries
from .options import CacheOptions
from .refusals import attended_again, unattended


class Pending(NamedTuple):
    """An update that was not attended to yet.

    module: whose attention is to come; offset: tokens seen before it; slots: what the
    layer held before it (a batch does not say); chunk: what is stored only when it is
    attended to.
    """

    module: str
    offset: int
    slots: Any = None
    chunk: Any = None


class PolicyCache:
    """The order of things: `update_and_fetch`, `attend`, the next update."""

    rule: Rule
    options: CacheOptions

    def __init__(self, rule: Rule, shares: bool):
        self.rule = rule
        # None as soon as the last update was attended to: a second reference to the
        # arrays would turn the write, which is evaluated later, into a copy.
        self._pending: Pending | None = None
        self._shared = Shared(shares)

    @property
    def shares(self) -> bool:
        """Whether other layers attend to what this one does."""
        return self._shared.shares

    def attend(
        self,
        queries: mx.array,
        keys: Entries,
        values: Entries,
        *,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Attention of queries [B, n_heads, L, head_dim] over what the update gave.

        mask: "causal", bool or additive; sinks: learned logits [n_heads] in the
        softmax's denominator. Evicts afterwards what the policy says.
        """
        if not self._may_attend:
            if self._shared.entries is None:
                raise attended_again(self.rule)
            args = {"scale": scale, "mask": mask, "sinks": sinks}
            return self._shared.attend(queries, keys, values, **args)
        args = AttentionArgs(scale, mask, sinks)
        output = self._attend(queries, keys, values, args)
        self._pending = None
        return output

    @property
    def _must_attend(self) -> bool:
        """Whether every update has to be attended to."""
        scheduled = self.options.renumbering is not None or self.options.recall
        return not self.rule.by_age or bool(scheduled)

    @property
    def _may_attend(self) -> bool:
        """Whether an attention is the first one to the last update."""
        return self._pending is not None

    def _attend(
        self, queries: mx.array, keys: Entries, values: Entries, args: AttentionArgs
    ) -> mx.array:
        """The attention that the last update waits for."""
        raise NotImplementedError

    def _check_attended(self, stored: int) -> None:
        """Raise if an update of `stored` tokens was not attended to."""
        if self._pending is not None and self._must_attend:
            pending = self._pending
            raise unattended(pending.module, self.rule, pending.offset, stored)


def calling_module(depth: int = 2) -> str:
    """Return the name of the module that called, as many frames up."""
    return str(sys._getframe(depth).f_globals.get("__name__", "the model"))
