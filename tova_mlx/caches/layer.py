"""One layer's cache: the mlx-lm contract.

`PolicyKVCache` keeps a layer's slots under any policy. The order of a step is write,
attend, choose the victim. Knows one batch of rows of equal length.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from ..attention.arguments import AttentionArgs
from ..attention.block import attend_again
from ..attention.sharing import Shared
from ..errors import CacheStateError, OptionError, reason_of
from ..eviction import window_mask
from ..hooks import dispatcher, registration, trimming
from ..storage.archive import Archive
from ..storage.entries import Entries, to_mlx
from ..storage.formats import storage_for
from ..storage.observer import Callback, Observer, RecallCallback
from ..storage.recall import Recall
from ..storage.rewinding import can_take_back, take_back
from ..storage.rotation import Renumbering
from ..storage.slots import Slots
from ..storage.state import from_state, to_state
from .base import Pending, calling_module
from .batch import BatchPolicyKVCache
from .chunk import Chunk, attend, attend_in_parts, is_cut, store
from .held import HeldTokens
from .lockstep import Lockstep
from .options import JOURNAL, CacheOptions
from .refusals import check_entries, check_recall, check_values, windowed


class PolicyKVCache(HeldTokens):
    """A key/value cache of one layer that keeps `max_size` tokens under a policy.

    Per step the new token is stored, its query attends to everything held, and then,
    if `max_size + 1` tokens are held, the policy's victim is evicted. Feeding a text in
    chunks of any size holds the same tokens (`prefill="stepwise"`), up to scores that
    are equal but for rounding; quantised entries round in every layer.

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
            evicted; each costs the bytes of a token. 0: none.
        kv_bits: None, or 4 or 8 for quantised keys and values, or a pair for each;
            kv_group_size: values that share a scale, 32 or 64.
        renumbering: when the tokens held get new rotary positions, and how the layer
            rotates its keys; `make_prompt_cache(positions=...)` finds that out.
        recall: how many of `max_size` slots are not the policy's, but of what it
            evicted last, a multiple of 16: so many at a time go from there to an
            archive. Every token attends to all that was evicted, as in a full cache. 0:
            what is evicted is lost.
        options: the policy's own options, see `POLICIES[policy].options`.

    Raises:
        OptionError: a value that cannot work, or an option the policy does not read.

    Attributes: see `HeldTokens`.
    """

    def __init_subclass__(cls) -> None:
        _KINDS.append(cls)

    def __init__(
        self,
        max_size: int | None,
        policy: str = "tova",
        *,
        prefill: str = "stepwise",
        journal: int = JOURNAL,
        kv_bits: int | tuple[int, int] | None = None,
        kv_group_size: int = 64,
        renumbering: Renumbering | None = None,
        recall: int = 0,
        **options: Any,
    ):
        made = CacheOptions.resolve(
            max_size,
            policy,
            prefill=prefill,
            journal=journal,
            kv_bits=kv_bits,
            kv_group_size=kv_group_size,
            renumbering=renumbering,
            recall=recall,
            **options,
        )
        self._configure(made)

    @classmethod
    def of(
        cls, options: CacheOptions, slots: Slots | None = None, shares: bool = False
    ) -> "PolicyKVCache":
        """A cache made with resolved options; `slots`: what it holds.

        shares: whether other layers attend to what it holds too.
        """
        cache = cls.__new__(cls)
        cache._configure(options, slots, shares)
        return cache

    def _configure(
        self, options: CacheOptions, slots: Slots | None = None, shares: bool = False
    ) -> None:
        dispatcher.install()
        trimming.install()
        registration.install(*_KINDS)
        # That of the slots may pin a conversation's first tokens.
        super().__init__(options.rule if slots is None else slots.rule, shares)
        self.options = options
        if slots is None:
            slots = Slots(
                options.rule,
                options.journal,
                options.storage,
                options.renumbering,
                _recall_of(options),
            )
        self._slots = slots
        # Shared by the caches of one model, see `lockstep`.
        self.lockstep = Lockstep()

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__}({self.max_size}, {self.rule.policy!r}): holds "
            f"{self.size()} of {self.seen} tokens, {self.nbytes:,} bytes>"
        )

    @property
    def prefill(self) -> str:
        """ "stepwise", or "once"."""
        return self.options.prefill

    @property
    def keys(self) -> Entries | None:
        """All slots [B, n_kv_heads, slots, head_dim], in no order; None if empty."""
        return self._slots.keys

    @keys.setter
    def keys(self, keys: Entries | None) -> None:
        # mlx-lm's pipelines make them depend on what is sent.
        self._slots.keys = keys

    def share(self) -> None:
        """Let other layers attend to what this one does, as of the next update."""
        self._shared = Shared(shares=True)

    def pin(self, n: int) -> None:
        """Protect the first n tokens from eviction, at most half of `max_size`.

        Raises CacheStateError: tokens were seen already.
        """
        if self.seen:
            raise CacheStateError(
                f"{self.rule.policy}: tokens are pinned before any is seen, and "
                f"{self.seen} were. Start a new cache."
            )
        self._slots = self._slots.twin()
        self.rule = self._slots.rule = self.options.rule.pinning(n)

    def observe(
        self,
        callback: Callback | None,
        *,
        scores: bool = False,
        recalled: RecallCallback | None = None,
    ) -> None:
        """Call back for every eviction from now on; None ends it.

        callback: `callback(steps, positions)`; the rest: see `observe_evictions`.
        """
        self._slots.observer = Observer(
            callback, wants_scores=scores, recalled=recalled
        )

    # The model's side

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """The mask for a chunk of N tokens: [N, size() + N], "causal" or None."""
        limit = self.rule.max_size
        evicts = limit is not None and self.seen + N > limit + 1
        if window_size is not None:
            if limit is not None and self.seen + N > limit:
                raise windowed(self.rule, window_size, self.seen + N)
            return create_causal_mask(N, self.seen, window_size=window_size)
        if N == 1:
            return None
        whole = self.options.recall or is_cut(self._slots, N)
        if evicts and self.rule.by_age and not whole:
            return to_mlx(window_mask(self.rule, self.seen, N))
        if return_array:
            return create_causal_mask(N, self.size())
        return "causal"

    def update_and_fetch(
        self, keys: mx.array, values: mx.array, *, module: str | None = None
    ) -> tuple[Entries, Entries]:
        """Store new keys and values [B, n_kv_heads, L, head_dim]; return all to see.

        module: who is going to attend; the caller's if not given.
        """
        if self._pending is not None:
            self._check_attended(self.seen - self._pending.offset)
        check_entries(self.rule, self.keys, keys, self.values, values)
        self.lockstep.enter(self)
        # Before anything is written: a second reference turns a write into a copy.
        self._shared.forget()
        # Changed apart and put in place at the end: what fails leaves no trace.
        slots, chunk = self._slots.twin(), Chunk(keys, values)
        if is_cut(slots, chunk.length):
            # Stored part by part, when there are queries too. What is given has the
            # right shape, and is never computed.
            entries = slots.extend(*chunk)
            slots = self._slots
        else:
            entries, chunk = store(slots, chunk), None
        if self._must_attend:
            by = module or calling_module()
            self._pending = Pending(by, self.seen, self._slots, chunk)
        self._slots = slots
        return self._shared.give(entries)

    @property
    def _may_attend(self) -> bool:
        return super()._may_attend or not self._must_attend

    def _attend(
        self, queries: mx.array, keys: Entries, values: Entries, args: AttentionArgs
    ) -> mx.array:
        slots, pending = self._slots.twin(), self._pending
        if pending is not None:
            check_values(pending.module, self.rule, slots.values, values)
            if slots.recall is not None:
                stored = pending.chunk or (slots.keys, slots.values)
                check_recall(pending.module, stored, (keys, values))
        if pending is not None and pending.chunk is not None:
            output = attend_in_parts(slots, pending.chunk, queries, args)
            output = slots.tied(output)
        else:
            once = self.prefill == "once"
            output, blocks = attend(slots, queries, keys, values, args, once=once)
            if blocks is not None:
                self._shared.attend_with(partial(attend_again, blocks))
            if slots.do_scheduled():
                output = slots.tied(output)
        self._slots = slots
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
        return self.seen == 0 or not (self._slots.evicted or self.rule.memory)

    def can_trim(self, n: int) -> bool:
        """Whether the newest n tokens can be taken back exactly."""
        if n <= 0:
            return True
        before, n = self._before(min(n, self.seen))
        return n >= 0 and can_take_back(before, n)

    def trim(self, n: int) -> int:
        """Take back the newest n tokens; returns how many were taken, 0 for n <= 0.

        Raises CacheStateError when `can_trim(n)` is false; the cache stays as it was.
        """
        n = max(0, min(self.seen, n))
        if not n:
            return 0
        if not self.can_trim(n):
            raise CacheStateError(
                f"{self.rule.policy}: {n} tokens cannot be taken back after "
                f"{self.seen} seen with max_size={self.max_size} and "
                f"journal={self.journal}: what they evicted or added to "
                "scores is lost. Use a longer journal, or start a new cache."
            )
        before, rest = self._before(n)
        slots = before.twin()
        take_back(slots, rest)
        self._shared.forget()
        self._slots, self._pending = slots, None
        return n

    def _before(self, n: int) -> tuple[Slots, int]:
        """Return what a pending update found, and how many of n came before it."""
        if self._pending is None:
            return self._slots, n
        before = self._pending.slots
        return before, n - (self.seen - before.offset)

    def _attended(self) -> Slots:
        """Return the slots, with nothing pending. Raises as the next update would."""
        if self._pending is not None:
            self._check_attended(self.seen - self._pending.offset)
        return self._slots

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> "PolicyKVCache":
        """The same cache with quantised keys and values, as mlx-lm asks for it.

        One that is quantised already stays as it is.
        """
        slots = self._attended()
        if not slots.storage.is_plain:
            return self
        if slots.recall is not None:
            raise OptionError(
                f"{self.rule.policy}: evicted tokens are stored for recall already, so "
                "a cache cannot be quantised on the way. Give kv_bits to "
                "make_prompt_cache or convert."
            )
        stored = slots.stored_in(storage_for(bits, group_size))
        options = replace(self.options, storage=stored.storage)
        return self.of(options, stored, self.shares)

    @property
    def state(self) -> tuple[Any, ...]:
        """Arrays and scalars that `from_state` rebuilds the cache from."""
        return to_state(
            self._attended(),
            self.options.rule,
            prefill=self.prefill,
            shares=self.shares,
        )

    @state.setter
    def state(self, state: tuple[Any, ...]) -> None:
        slots, how = from_state(state)
        journal = slots.journal.length
        try:
            recall = slots.recall
            made = CacheOptions(
                how["rule"],
                slots.storage,
                how["prefill"],
                journal,
                slots.renumbering,
                recall.slots if recall else 0,
                recall.archive.storage if recall else None,
            )
        except OptionError as error:
            raise CacheStateError(
                f"This is not the state of a tova_mlx cache ({reason_of(error)})."
            ) from error
        self._configure(made, slots, how["shares"])

    @classmethod
    def from_state(cls, state: tuple[Any, ...]) -> "PolicyKVCache":
        """A cache with the given `state`, its policy and options included."""
        cache = cls.__new__(cls)
        cache.state = state
        return cache

    # Batches

    @staticmethod
    def merge(caches: Sequence["PolicyKVCache"]) -> Any:
        """A `BatchPolicyKVCache` of copies of these caches."""
        return BatchPolicyKVCache.merge(caches)


def _recall_of(options: CacheOptions) -> Recall | None:
    """What of the evicted is known at the beginning."""
    if options.archived is None:
        return None
    assert options.rule.max_size is not None
    archive = Archive(options.archived)
    slots, first = options.recall, options.rule.max_size
    return Recall(slots, first, archive, options.journal, period=slots)


# What mlx-lm's `load_prompt_cache` may have to find.
_KINDS: list[type[PolicyKVCache]] = [PolicyKVCache]
