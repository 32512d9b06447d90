"""One layer's cache: the mlx-lm contract.

`PolicyKVCache` keeps a layer's slots under any policy; `TOVACache` is the same with
the paper's. The order of a step is write, attend, choose the victim. Knows one batch
of rows of equal length.
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.base import create_causal_mask

from ..attention.block import attend_again
from ..attention.evicting import (
    attend_and_evict,
    attend_and_keep,
    evict_oldest,
    evict_unseen,
)
from ..attention.sharing import Given
from ..attention.softmax import attend_newest, plain_attention
from ..errors import CacheStateError
from ..eviction import window_mask
from ..hooks import dispatcher as attention
from ..hooks import trimming
from ..policies import Granularity, Rule, settle
from ..storage.packed import Rows, Storage, storage, to_mlx
from ..storage.slots import Slots
from ..storage.state import pack, unpack
from .lockstep import Lockstep
from .refusals import (
    attended_again,
    check_options,
    check_rows,
    check_values,
    unattended,
    windowed,
)

JOURNAL = 16


class _Pending(NamedTuple):
    """An update that was not attended to yet: who is to, and what there was before."""

    module: str
    before: Slots


class PolicyKVCache:
    """A key/value cache of one layer that keeps `max_size` tokens under a policy.

    Per step the new token is stored, its query attends to everything held, and then,
    if `max_size + 1` tokens are held, the policy's victim leaves. Feeding a text in
    chunks of any size keeps the same tokens (`prefill="stepwise"`), up to scores that
    are equal but for rounding; quantised rows round in every layer.

    A forward that fails leaves the cache as it was before it, or with an update that
    nobody attended to: then every use says so until `trim` takes it back.

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
        # None as soon as the last update was attended to: a second reference to the
        # arrays would turn the write, which is evaluated later, into a copy.
        self._pending: _Pending | None = None
        self._given = Given()
        # Shared by the caches of one model, see `lockstep`.
        self.lockstep = Lockstep()

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
        self._given = Given(shares=True)

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
        if self._pending is not None:
            raise self._unattended()
        check_rows(self.rule, self.keys, keys)
        self.lockstep.enter(self)
        # Before anything is written: a second reference turns a write into a copy.
        self._given.forget()
        rule, length = self.rule, keys.shape[2]
        # Changed apart and put in place at the end: what fails leaves no trace.
        slots = self._slots.twin()
        fits = rule.max_size is None or self.offset + length <= rule.max_size
        # A memory must see every query, so even a chunk that fits is scanned.
        if length == 1 or (fits and not rule.memory):
            rows = slots.append(keys, values)
            if slots.evicted and rule.by_age:
                evict_unseen(slots)
        else:
            rows = slots.extend(keys, values)
            if rule.by_age:
                evict_oldest(slots)
        if not rule.by_age:
            by = module or str(sys._getframe(1).f_globals["__name__"])
            self._pending = _Pending(by, self._slots)
        self._slots = slots
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
        one = queries.shape[2] == 1
        if rule.by_age:
            if one and slots.evicted:
                output = attend_newest(queries, keys, values, **how)[0]
            else:
                output = plain_attention(queries, keys, values, **how)
            return slots.tied(output)
        if self._pending is None:
            if self._given.rows is None:
                raise attended_again(rule)
            return self._given.attend(queries, keys, values, **how)
        check_values(self._pending.module, rule, slots.values, values)
        slots = slots.twin()
        if one and (rule.memory or slots.evicted):
            output = attend_and_evict(slots, queries, keys, values, **how)
        elif rule.memory or slots.evicted:
            once = self.prefill == "once"
            result = attend_and_keep(slots, queries, keys, values, once=once, **how)
            self._given.note_again(partial(attend_again, result.blocks))
            output = result.output
        else:
            output = slots.tied(plain_attention(queries, keys, values, **how))
        self._slots, self._pending = slots, None
        return output

    # Trimming, saving

    def is_trimmable(self) -> bool:
        """Whether any number of tokens can be taken back exactly.

        Not once a token was evicted, and not for a policy with memory, whose scores
        hold what the tokens to be taken back attended to. The newest few can be taken
        back nevertheless, see `can_trim`.
        """
        if self._pending is not None:
            return False
        return self.offset == 0 or not (self._slots.evicted or self.rule.memory)

    def can_trim(self, n: int) -> bool:
        """Whether the newest n tokens can be taken back exactly."""
        if n <= 0:
            return True
        before, n = self._before(min(n, self.offset))
        return n >= 0 and before.can_take_back(n)

    @property
    def journal(self) -> int:
        """How many of the newest tokens can be taken back after evictions."""
        return self._slots.journal.length

    def trim(self, n: int) -> int:
        """Take back the newest n tokens; returns how many were taken, 0 for n <= 0.

        Raises CacheStateError when `can_trim(n)` is false; the cache stays as it was.
        """
        n = max(0, min(self.offset, n))
        if not n:
            return 0
        if not self.can_trim(n):
            raise CacheStateError(
                f"{self.rule.policy}: {n} tokens cannot be taken back after "
                f"{self.offset} seen with max_size={self.max_size} and "
                f"journal={self.journal}: what they evicted or added to "
                "scores is gone. Use a longer journal, or start a new cache."
            )
        before, rest = self._before(n)
        slots = before.twin()
        slots.take_back(rest)
        self._given.forget()
        self._slots, self._pending = slots, None
        return n

    def _before(self, n: int) -> tuple[Slots, int]:
        """What there was before a pending update, and how many of n come before it."""
        if self._pending is None:
            return self._slots, n
        before = self._pending.before
        return before, n - (self.offset - before.offset)

    def _unattended(self) -> Exception:
        assert self._pending is not None
        before = self._pending.before.offset
        return unattended(self._pending.module, self.rule, before, self.offset - before)

    def _settled(self) -> Slots:
        """The slots, with nothing pending. Raises as the next update would."""
        if self._pending is not None:
            raise self._unattended()
        return self._slots

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> "PolicyKVCache":
        """The same cache with quantised keys and values, as mlx-lm asks for it.

        One that is quantised already stays as it is.
        """
        slots = self._settled()
        if slots.storage.key_bits is not None:
            return self
        kept = storage(bits, group_size)
        twin = slots.twin()
        twin.storage, twin.journal = kept, slots.journal.empty()
        if twin.keys is not None and twin.values is not None:
            twin.keys, twin.values = kept.pack(twin.keys, twin.values)
        return self.of_slots(twin, self.prefill, self.shares)

    @property
    def state(self) -> tuple[Any, ...]:
        """Arrays and scalars that `from_state` rebuilds the cache from."""
        return pack(self._settled(), prefill=self.prefill, shares=self.shares)

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
        memory: share of the old score kept per token, 0 to 1; 0 is the paper's.
        value_weighted: whether a weight counts times the norm of the token's value.
        prefill: "stepwise" (exact token by token) or "once" (see PolicyKVCache).
        journal: newest tokens that can be taken back (see PolicyKVCache).
        kv_bits, kv_group_size: quantised keys and values (see PolicyKVCache).

    Raises:
        OptionError: a value that cannot work.

    Source: "Transformers are Multi-State RNNs", arXiv 2401.06104, section 3.
    Differs from the source: stepwise prefill, granularity "head", `n_sinks`,
    `n_recent`, `memory` and `value_weighted`.
    """

    def __init__(
        self,
        max_size: int,
        *,
        granularity: Granularity = "layer",
        n_sinks: int = 0,
        n_recent: int = 0,
        memory: float = 0.0,
        value_weighted: bool = False,
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
            memory=memory,
            value_weighted=value_weighted,
            prefill=prefill,
            journal=journal,
            kv_bits=kv_bits,
            kv_group_size=kv_group_size,
        )


def register() -> None:
    """Name the classes where mlx-lm's `load_prompt_cache` looks them up."""
    for kind in (PolicyKVCache, TOVACache):
        setattr(mlx_lm_cache, kind.__name__, kind)
