"""One layer's cache: the mlx-lm contract.

`PolicyKVCache` keeps a layer's slots under any policy; `TOVACache` is the same with
the paper's. The order of a step is write, attend, choose the victim. Knows one batch
of rows of equal length.
"""

import copy
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.base import create_causal_mask

from . import attention, trimming
from .block import attend_again
from .errors import CacheStateError
from .evicting import attend_and_evict, attend_and_keep, evict_oldest, evict_unseen
from .eviction import window_mask
from .journal import Journal
from .newest import attend_newest, plain_attention
from .packed import Rows, Storage, storage, to_mlx
from .policies import Granularity, Rule, settle
from .refusals import (
    attended_again,
    check_options,
    check_rows,
    check_values,
    unseen,
    windowed,
)
from .sharing import Given
from .slots import Slots
from .state import pack, unpack

JOURNAL = 16


class PolicyKVCache:
    """A key/value cache of one layer that keeps `max_size` tokens under a policy.

    Per step the new token is stored, its query attends to everything held, and then,
    if `max_size + 1` tokens are held, the policy's victim leaves. Feeding a text in
    chunks of any size keeps the same tokens (`prefill="stepwise"`).

    Args:
        max_size: tokens kept (the paper's multi-state size), at least 1. The policy
            `full` accepts and does not read it.
        policy: a name in `POLICIES`.
        prefill: "stepwise", or "once" (the paper's released shortcut: a chunk attends
            to everything in it and is cut once, so the result depends on the chunk
            size); "once" only for policies that read attention.
        journal: how many of the newest tokens can be taken back after something was
            evicted; each costs a row. 0: none.
        kv_bits: None, or 4 or 8 for quantised keys and values, or a pair for each;
            kv_group_size: values that share a scale, 32 or 64.
        options: the policy's own options, see `POLICIES[policy].options`.

    Raises:
        OptionError: a value that cannot work, or an option the policy does not read.

    Attributes:
        offset: tokens seen, the position of the next token.
    """

    def __init__(
        self,
        max_size: int | None,
        policy: str = "tova",
        *,
        prefill: str = "stepwise",
        journal: int = JOURNAL,
        kv_bits: int | tuple[int, int] | None = None,
        kv_group_size: int = 64,
        **options: Any,
    ):
        kept = storage(kv_bits, kv_group_size)
        self._configure(settle(policy, max_size, options), prefill, journal, kept)

    def _configure(self, rule: Rule, prefill: str, journal: int, kept: Storage) -> None:
        check_options(rule, prefill, journal)
        attention.install()
        trimming.install()
        register()
        self.rule = rule
        self.prefill = prefill
        self._slots = Slots(rule, journal, kept)
        # The module whose attention is still to come for the last update.
        self._awaits: str | None = None
        self._given = Given()

    # What is held

    @property
    def max_size(self) -> int | None:
        """Tokens kept; None for no limit."""
        return self.rule.max_size

    @property
    def offset(self) -> int:
        """Tokens seen, the position of the next token."""
        return self._slots.offset

    @property
    def keys(self) -> Rows | None:
        """All slots [B, n_kv_heads, slots, head_dim], in no order; None if empty."""
        return self._slots.keys

    @keys.setter
    def keys(self, keys: Rows | None) -> None:
        # mlx-lm's pipelines make them depend on what is sent.
        self._slots.keys = keys

    def share(self) -> None:
        """Let other layers attend to what this one does, as of the next update."""
        self._given.start()

    @property
    def shares(self) -> bool:
        """Whether other layers attend to what this one does."""
        return self._given.shares

    @property
    def values(self) -> Rows | None:
        """All slots [B, n_kv_heads, slots, head_dim], in no order; None if empty."""
        return self._slots.values

    def size(self) -> int:
        """Tokens held."""
        return self._slots.size()

    def empty(self) -> bool:
        return self._slots.keys is None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays of the cache, the journal's included."""
        return self._slots.nbytes

    @property
    def max_nbytes(self) -> int | None:
        """Bytes that the cache can reach; None if unlimited or still empty."""
        return self._slots.max_nbytes

    @property
    def positions(self) -> mx.array:
        """The index of the token in each slot held, int32 [B, H', size()].

        In ascending order, the order of `keys_and_values`. H' is 1, or n_kv_heads
        with granularity "head".
        """
        return self._slots.held_positions()

    def keys_and_values(self) -> tuple[Rows, Rows]:
        """The held rows [B, n_kv_heads, size(), head_dim], in order of position."""
        if self.empty():
            raise CacheStateError(
                "An empty cache has no keys. Run the model with it first."
            )
        if self._given.rows is not None:
            # A layer that shares this one's keys attends to what this one attended to.
            return self._given.rows
        return self._slots.held_rows()

    # The model's side

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """The mask for a chunk of N tokens: [N, size() + N], "causal" or None."""
        limit = self.rule.max_size
        evicts = limit is not None and self.offset + N > limit + 1
        if window_size is not None:
            if limit is not None and self.offset + N > limit:
                raise windowed(self.rule, window_size, self.offset + N)
            return create_causal_mask(N, self.offset, window_size=window_size)
        if N == 1:
            return None
        if evicts and self.rule.by_age:
            return to_mlx(window_mask(self.rule, self.offset, N))
        if return_array:
            return create_causal_mask(N, self.size())
        return "causal"

    def update_and_fetch(
        self, keys: mx.array, values: mx.array, *, module: str | None = None
    ) -> tuple[Rows, Rows]:
        """Store new rows [B, n_kv_heads, L, head_dim]; return all to attend to.

        module: who is going to attend; the caller's if not given.
        """
        if self._awaits is not None:
            raise unseen(self._awaits, self.rule.policy)
        check_rows(self.rule, self.keys, keys)
        # Before anything is written: a second reference turns a write into a copy.
        self._given.forget()
        length = keys.shape[2]
        limit = self.rule.max_size
        if not self.rule.by_age:
            self._awaits = module or sys._getframe(1).f_globals["__name__"]
        fits = limit is None or self.offset + length <= limit
        # A memory must see every query, so even a chunk that fits is scanned.
        if length == 1 or (fits and not self.rule.memory):
            rows = self._slots.append(keys, values)
            if self._slots.evicted and self.rule.by_age:
                evict_unseen(self._slots)
            return self._given.note(rows)
        rows = self._slots.extend(keys, values)
        if self.rule.by_age:
            evict_oldest(self._slots)
        return self._given.note(rows)

    def attend(
        self,
        queries: mx.array,
        keys: Rows,
        values: Rows,
        *,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Attention of queries [B, n_heads, L, head_dim] over what the update gave.

        mask: "causal", bool or additive; sinks: learned logits [n_heads] in the
        softmax's denominator. Evicts afterwards what the policy says.
        """
        rule, slots = self.rule, self._slots
        how: dict[str, Any] = {"scale": scale, "mask": mask, "sinks": sinks}
        if not rule.by_age:
            if self._awaits is None:
                if self._given.rows is None:
                    raise attended_again(rule)
                return self._given.attend(queries, keys, values, **how)
            check_values(self._awaits, rule, slots.values, values)
            self._awaits = None
        if rule.memory or slots.evicted:
            if queries.shape[2] == 1:
                if not rule.by_age:
                    return attend_and_evict(slots, queries, keys, values, **how)
                return attend_newest(queries, keys, values, **how)[0]
            if not rule.by_age:
                once = self.prefill == "once"
                result = attend_and_keep(slots, queries, keys, values, once=once, **how)
                self._given.note_again(partial(attend_again, result.blocks))
                return result.output
        return plain_attention(queries, keys, values, **how)

    # Trimming, saving

    def is_trimmable(self) -> bool:
        """Whether any number of tokens can be taken back exactly.

        Not once a token was evicted, and not for a policy with memory, whose scores
        hold what the tokens to be taken back attended to. The newest few can be taken
        back nevertheless, see `can_trim`.
        """
        return self.offset == 0 or not (self._slots.evicted or self.rule.memory)

    def can_trim(self, n: int) -> bool:
        """Whether the newest n tokens can be taken back exactly."""
        return self._slots.can_take_back(n)

    def trim(self, n: int) -> int:
        """Take back the newest n tokens; returns how many were taken.

        Raises CacheStateError when `can_trim(n)` is false; the cache stays as it was.
        """
        n = max(0, min(self.offset, n))
        if not self.can_trim(n):
            raise CacheStateError(
                f"{self.rule.policy}: {n} tokens cannot be taken back after "
                f"{self.offset} seen with max_size={self.max_size} and "
                f"journal={self._slots.journal.length}: what they evicted or added to "
                "scores is gone. Use a longer journal, or start a new cache."
            )
        self._slots.take_back(n)
        return n

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> "PolicyKVCache":
        """The same cache with quantised keys and values, as mlx-lm asks for it.

        One that is quantised already stays as it is.
        """
        if self._slots.storage.key_bits is not None:
            return self
        kept = storage(bits, group_size)
        twin = copy.copy(self._slots)
        twin.storage, twin.journal = kept, Journal(self._slots.journal.length)
        if twin.keys is not None and twin.values is not None:
            twin.keys, twin.values = kept.pack(twin.keys, twin.values)
        return self.of_slots(twin, self.prefill, self.shares)

    @property
    def state(self) -> tuple[Any, ...]:
        """Arrays and scalars that `from_state` rebuilds the cache from."""
        return pack(self._slots, prefill=self.prefill, shares=self.shares)

    @state.setter
    def state(self, state: tuple[Any, ...]) -> None:
        slots, how = unpack(state)
        self._take(slots, **how)

    @classmethod
    def from_state(cls, state: tuple[Any, ...]) -> "PolicyKVCache":
        """A cache with the given `state`, its policy and options included."""
        cache = cls.__new__(cls)
        cache.state = state
        return cache

    @property
    def slots(self) -> Slots:
        """What is held, and where."""
        return self._slots

    @classmethod
    def of_slots(cls, slots: Slots, prefill: str, shares: bool) -> "PolicyKVCache":
        """A cache that holds these; `shares`: other layers attend to them too."""
        cache = cls.__new__(cls)
        cache._take(slots, prefill, shares)
        return cache

    def _take(self, slots: Slots, prefill: str, shares: bool) -> None:
        self._configure(slots.rule, prefill, slots.journal.length, slots.storage)
        self._slots = slots
        if shares:
            self.share()

    # Batches

    @staticmethod
    def merge(caches: Sequence["PolicyKVCache"]) -> Any:
        """A `BatchPolicyKVCache` of copies of these caches."""
        from .batch import BatchPolicyKVCache

        return BatchPolicyKVCache.merge(caches)


class TOVACache(PolicyKVCache):
    """A key/value cache of one layer that keeps the tokens most attended last.

    After each token has attended, the token that it attended to least, on the mean
    over the heads, leaves. Nothing else is protected: not the first tokens, not the
    newest.

    Args:
        max_size: tokens kept (the paper's multi-state size), at least 1.
        granularity: "layer", one victim per layer (the paper's best), or "head", one
            per KV head by the mean over its query heads.
        n_sinks, n_recent: first and newest tokens protected, inside `max_size`.
        prefill: "stepwise" (exact token by token) or "once" (see PolicyKVCache).
        journal: newest tokens that can be taken back (see PolicyKVCache).
        kv_bits, kv_group_size: quantised keys and values (see PolicyKVCache).

    Raises:
        OptionError: a value that cannot work.

    Source: "Transformers are Multi-State RNNs", arXiv 2401.06104, section 3.
    Differs from the source: stepwise prefill, granularity "head", `n_sinks` and
    `n_recent`.
    """

    def __init__(
        self,
        max_size: int,
        *,
        granularity: Granularity = "layer",
        n_sinks: int = 0,
        n_recent: int = 0,
        prefill: str = "stepwise",
        journal: int = JOURNAL,
        kv_bits: int | tuple[int, int] | None = None,
        kv_group_size: int = 64,
    ):
        super().__init__(
            max_size,
            "tova",
            granularity=granularity,
            n_sinks=n_sinks,
            n_recent=n_recent,
            prefill=prefill,
            journal=journal,
            kv_bits=kv_bits,
            kv_group_size=kv_group_size,
        )


def register() -> None:
    """Name the classes where mlx-lm's `load_prompt_cache` looks them up."""
    for kind in (PolicyKVCache, TOVACache):
        setattr(mlx_lm_cache, kind.__name__, kind)
