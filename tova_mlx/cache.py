"""One layer's slots and the mlx-lm contract.

`PolicyKVCache` holds keys and values in slots under any policy; `TOVACache` is the
same with the paper's policy. A full cache has `max_size + 1` slots: the newest token
is written into the slot of the last victim, attends, and only then the next victim is
chosen, so an eviction moves nothing. Knows one batch of rows of equal length.
"""

import json
import sys
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.base import create_causal_mask

from . import attention
from .block import attend_block, gather, to_mlx
from .errors import CacheStateError, OptionError, UnsupportedModelError
from .eviction import choose_victim, update_scores
from .policies import Granularity, Rule, settle

_STATE_VERSION = 1


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
        options: the policy's own options, see `POLICIES[policy].options`.

    Raises:
        OptionError: a value that cannot work, or an option the policy does not read.

    Attributes:
        offset: tokens seen, the position of the next token.
    """

    step = 256

    def __init__(
        self,
        max_size: int | None,
        policy: str = "tova",
        *,
        prefill: str = "stepwise",
        **options: Any,
    ):
        self._configure(settle(policy, max_size, options), prefill)

    def _configure(self, rule: Rule, prefill: str) -> None:
        if prefill not in ("stepwise", "once"):
            raise OptionError(
                f"{rule.policy}: prefill={prefill!r} is not known. "
                "Use 'stepwise' or 'once'."
            )
        if prefill == "once" and not rule.reads_attention:
            raise OptionError(
                f"{rule.policy} does not read prefill='once': it cuts by attention. "
                "Leave it out."
            )
        attention.install()
        for kind in (PolicyKVCache, TOVACache):
            # load_prompt_cache looks classes up there by name.
            setattr(mlx_lm_cache, kind.__name__, kind)
        self.rule = rule
        self.prefill = prefill
        self.offset = 0
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        # While nothing was evicted, slot i holds position i and this is None.
        self._positions: mx.array | None = None
        self._scores: mx.array | None = None
        self._norms: mx.array | None = None
        # None: the next token goes to slot `size()`.
        self._victim: mx.array | None = None
        # The module whose attention is still to come for the last update.
        self._awaits: str | None = None

    # What is held

    @property
    def max_size(self) -> int | None:
        """Tokens kept; None for no limit."""
        return self.rule.max_size

    def size(self) -> int:
        """Tokens held."""
        limit = self.rule.max_size
        return self.offset if limit is None else min(self.offset, limit)

    def empty(self) -> bool:
        return self.keys is None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays of the cache."""
        return sum(a.nbytes for a in self._arrays() if a is not None)

    @property
    def max_nbytes(self) -> int | None:
        """Bytes that the cache can reach; None if unlimited or still empty."""
        limit = self.rule.max_size
        if limit is None or self.keys is None or self.values is None:
            return None
        batch, n_kv_heads, _, key_dim = self.keys.shape
        per_slot = (
            batch * n_kv_heads * (key_dim + self.values.shape[3]) * self.keys.itemsize
        )
        choosers = n_kv_heads if self.rule.per_head else 1
        per_slot += 4 * batch * choosers * (1 + bool(self.rule.memory))
        per_slot += 4 * batch * n_kv_heads * self.rule.value_weighted
        return per_slot * (limit + 1) + 4 * batch * choosers

    @property
    def positions(self) -> mx.array:
        """The index of the token in each slot held, int32 [B, H', size()].

        In ascending order, the order of `keys_and_values`. H' is 1, or n_kv_heads
        with granularity "head".
        """
        if self.keys is None:
            return mx.zeros((1, 1, 0), mx.int32)
        return self._held_positions(self._order())

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """The held rows [B, n_kv_heads, size(), head_dim], in order of position."""
        if self.keys is None or self.values is None:
            raise CacheStateError(
                "An empty cache has no keys. Run the model with it first."
            )
        order = self._order()
        return self._held(self.keys, order), self._held(self.values, order)

    # The model's side

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """The mask for a chunk of N tokens: [N, size() + N], "causal" or None."""
        limit = self.rule.max_size
        evicts = limit is not None and self.offset + N > limit + 1
        if window_size is not None:
            if limit is not None and self.offset + N > limit:
                raise UnsupportedModelError(
                    f"{self.rule.policy}: a layer wants a sliding window of "
                    f"{window_size} tokens, which a bounded cache of other tokens "
                    f"cannot give. Use max_size={self.offset + N} or more, or leave "
                    "this layer its own cache."
                )
            return create_causal_mask(N, self.offset, window_size=window_size)
        if N == 1:
            return None
        if evicts and not self.rule.reads_attention:
            return self._window_mask(N)
        if return_array:
            return create_causal_mask(N, self.size())
        return "causal"

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Store new rows [B, n_kv_heads, L, head_dim]; return all to attend to."""
        if self._awaits is not None:
            raise UnsupportedModelError(
                f"{self._awaits} computes its own attention, so {self.rule.policy} "
                "cannot see its queries. Use policy window or streaming, or another "
                "model."
            )
        self._check_rows(keys)
        length = keys.shape[2]
        limit = self.rule.max_size
        if self.rule.reads_attention:
            self._awaits = sys._getframe(1).f_globals.get("__name__", "the model")
        fits = limit is None or self.offset + length <= limit
        # A memory must see every query, so even a chunk that fits is scanned.
        if length == 1 or (
            fits and not (self.rule.memory and self.rule.reads_attention)
        ):
            return self._append(keys, values)
        return self._open_block(keys, values)

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Attention of queries [B, n_heads, L, head_dim] over what the update gave.

        mask: "causal", bool or additive; sinks: learned logits [n_heads] in the
        softmax's denominator. Evicts afterwards what the policy says.
        """
        rule = self.rule
        if rule.reads_attention:
            if self._awaits is None:
                raise UnsupportedModelError(
                    "A layer attends twice to one cache update (shared keys and "
                    f"values), which {rule.policy} cannot follow yet. Use policy "
                    "window or streaming, or another model."
                )
            self._awaits = None
            if queries.shape[2] == 1:
                return self._attend_newest(queries, keys, values, scale, mask, sinks)
            fits = rule.max_size is None or self.offset <= rule.max_size
            if rule.memory or not fits:
                return self._attend_block(queries, keys, values, scale, mask, sinks)
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=scale, mask=mask, sinks=sinks
        )

    # Trimming, saving

    def is_trimmable(self) -> bool:
        """Whether the newest tokens can be taken back exactly.

        Not once a token was evicted, and not for a policy with memory, whose scores
        hold what the tokens to be taken back attended to.
        """
        limit = self.rule.max_size
        evicted = limit is not None and self.offset > limit
        remembers = self.rule.reads_attention and self.rule.memory > 0
        return self.offset == 0 or not (evicted or remembers)

    def trim(self, n: int) -> int:
        """Take back the newest n tokens; returns how many were taken.

        Raises CacheStateError when `is_trimmable()` is false.
        """
        if not self.is_trimmable():
            raise CacheStateError(
                f"{self.rule.policy}: {n} tokens cannot be taken back after "
                f"{self.offset} seen with max_size={self.max_size}: what they evicted "
                "or added to scores is gone. Start a new cache."
            )
        n = min(self.offset, n)
        self.offset -= n
        return n

    @property
    def state(self) -> tuple[Any, ...]:
        """Arrays and scalars that `from_state` rebuilds the cache from."""
        config = {
            "version": _STATE_VERSION,
            "rule": self.rule.as_dict(),
            "prefill": self.prefill,
        }
        return (*self._arrays(), self.offset, json.dumps(config))

    @state.setter
    def state(self, state: tuple[Any, ...]) -> None:
        try:
            *arrays, offset, text = state
            config = json.loads(text)
            if config["version"] != _STATE_VERSION:
                raise ValueError(f"version {config['version']}")
            rule = Rule(**config["rule"])
            keys, values, positions, scores, norms, victim = arrays
            prefill = config["prefill"]
        except (TypeError, ValueError, KeyError) as error:
            raise CacheStateError(
                f"This is not the state of a tova_mlx cache ({error}). Make it again "
                "with this version."
            ) from error
        self._configure(rule, prefill)
        self.keys, self.values, self.offset = keys, values, offset
        self._positions, self._scores = positions, scores
        self._norms, self._victim = norms, victim

    @classmethod
    def from_state(cls, state: tuple[Any, ...]) -> "PolicyKVCache":
        """A cache with the given `state`, its policy and options included."""
        cache = cls.__new__(cls)
        cache.state = state
        return cache

    # One token, or rows that evict nothing

    def _append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        start, length = self.size(), keys.shape[2]
        n = start + length
        if self._victim is None:
            self._reserve(n, keys, values)
        assert self.keys is not None
        assert self.values is not None
        self.keys = self._write(self.keys, keys, start)
        self.values = self._write(self.values, values, start)
        if self._norms is not None:
            self._norms = self._write(self._norms, _l2_norms(values), start)
        if self._victim is not None:
            taken = mx.arange(n) == self._victim
            assert self._positions is not None
            self._positions = mx.where(taken, self.offset, self._positions)
            if self._scores is not None:
                self._scores = mx.where(taken, 0.0, self._scores)
        elif self._positions is not None:
            self._positions[..., start:n] = self.offset
        self.offset += length
        if self.max_size is not None and n > self.max_size:
            if self._positions is None:
                choosers = self.keys.shape[1] if self.rule.per_head else 1
                shape = (self.keys.shape[0], choosers, n)
                self._positions = mx.broadcast_to(mx.arange(n, dtype=mx.int32), shape)
            if not self.rule.reads_attention:
                self._victim = choose_victim(
                    self._positions, None, self.offset - 1, self.rule
                )
        if n == self.keys.shape[2]:
            return self.keys, self.values
        return self.keys[..., :n, :], self.values[..., :n, :]

    def _attend_newest(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: Any,
        sinks: mx.array | None,
    ) -> mx.array:
        n = keys.shape[2]
        full = self.max_size is not None and n > self.max_size
        if not (full or self.rule.memory):
            return mx.fast.scaled_dot_product_attention(
                queries, keys, values, scale=scale, mask=mask, sinks=sinks
            )
        weights = newest_weights(queries, keys, scale, mask, sinks)
        if mx.metal.is_available():
            output = mx.fast.scaled_dot_product_attention(
                queries, keys, values, scale=scale, mask=mask, sinks=sinks
            )
        else:
            output = (weights.astype(values.dtype) @ values).reshape(
                *queries.shape[:3], values.shape[3]
            )
        norms = None if self._norms is None else self._norms[..., :n]
        held = None if self._scores is None else self._scores[..., :n]
        scores = update_scores(weights, norms, held, self.rule)
        if full:
            assert self._positions is not None
            self._victim = choose_victim(
                self._positions, scores, self.offset - 1, self.rule
            )
        tied = [a for a in (self._victim,) if a is not None]
        if self._scores is not None:
            spare = self._scores.shape[2] - n
            self._scores = mx.pad(scores, [(0, 0), (0, 0), (0, spare)])
            tied.append(self._scores)
        # Evaluated with the output, or every step's weights would stay alive until
        # something reads the scores.
        return mx.depends([output], tied)[0]

    # A block of rows, exactly as if one by one

    def _open_block(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        length = keys.shape[2]
        positions = mx.arange(self.offset, self.offset + length, dtype=mx.int32)
        if self.keys is not None and self.values is not None and self.offset:
            order = self._order()
            held_positions = self._held_positions(order)
            if self._scores is not None:
                self._scores = self._held(self._scores, order)
            if self._norms is not None:
                self._norms = self._held(self._norms, order)
            keys = mx.concatenate([self._held(self.keys, order), keys], axis=2)
            values = mx.concatenate([self._held(self.values, order), values], axis=2)
            shape = (*held_positions.shape[:2], length)
            self._positions = mx.concatenate(
                [held_positions, mx.broadcast_to(positions, shape)], axis=2
            )
        else:
            choosers = keys.shape[1] if self.rule.per_head else 1
            shape = (keys.shape[0], choosers, length)
            self._positions = mx.broadcast_to(positions, shape)
            self._scores = self._norms = None
        if self.rule.value_weighted:
            new = _l2_norms(values[..., -length:, :])
            parts = [new] if self._norms is None else [self._norms, new]
            self._norms = mx.concatenate(parts, axis=2)
        self._victim = None
        self.offset += length
        self.keys, self.values = keys, values
        if not self.rule.reads_attention:
            self._keep_window(keys.shape[2])
        return keys, values

    def _attend_block(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: Any,
        sinks: mx.array | None,
    ) -> mx.array:
        assert self._positions is not None
        result = attend_block(
            queries,
            keys,
            values,
            scale=scale,
            mask=mask,
            sinks=sinks,
            positions=np.array(self._positions),
            scores=None if self._scores is None else np.array(self._scores),
            norms=None if self._norms is None else np.array(self._norms),
            rule=self.rule,
            cut_once=self.prefill == "once",
        )
        self._keep(result.survivors)
        self._scores = None
        if self.rule.memory:
            spare = self._slots(self.size() + 1) - self.size()
            scores = to_mlx(result.scores)
            self._scores = mx.pad(scores, [(0, 0), (0, 0), (0, spare)])
        return result.output

    def _window_mask(self, length: int) -> mx.array:
        """Who a row sees when the oldest leave: bool [L, size() + L]."""
        assert self.rule.max_size is not None
        n_sinks = self.rule.n_sinks
        recent = self.rule.max_size - n_sinks
        held = np.arange(self.offset)
        held = np.concatenate([held[:n_sinks], held[n_sinks:][-recent:]])
        rows = np.arange(self.offset, self.offset + length)
        columns = np.concatenate([held, rows])
        seen = (columns < n_sinks) | (columns >= rows[:, None] - recent)
        return to_mlx(seen & (columns <= rows[:, None]))

    def _keep_window(self, n: int) -> None:
        assert self.rule.max_size is not None
        assert self.keys is not None
        n_sinks = self.rule.n_sinks
        newest = np.arange(n - (self.rule.max_size - n_sinks), n)
        kept = np.concatenate([np.arange(n_sinks), newest]).astype(np.int32)
        self._keep(np.broadcast_to(kept, (self.keys.shape[0], 1, len(kept))))

    def _keep(self, columns: np.ndarray[Any, Any]) -> None:
        """Move the surviving columns [B, H', size()] into the first slots."""
        spare = self._slots(self.size() + 1) - self.size()
        # The free slots' contents are never read; any column will do.
        padded = np.pad(columns, [(0, 0), (0, 0), (0, spare)])
        assert self.keys is not None
        assert self.values is not None
        assert self._positions is not None
        self.keys = gather(self.keys, padded)
        self.values = gather(self.values, padded)
        if self._norms is not None:
            self._norms = gather(self._norms, padded)
        evicted = self.max_size is not None and self.offset > self.max_size
        self._positions = gather(self._positions, padded) if evicted else None

    # Slots

    def _arrays(self) -> tuple[mx.array | None, ...]:
        return (
            self.keys,
            self.values,
            self._positions,
            self._scores,
            self._norms,
            self._victim,
        )

    def _slots(self, n: int) -> int:
        """Slots to allocate for n tokens."""
        slots = -(-n // self.step) * self.step
        return slots if self.max_size is None else min(slots, self.max_size + 1)

    def _reserve(self, n: int, keys: mx.array, values: mx.array) -> None:
        """Make room for n tokens; doubles as the first allocation."""
        held = 0 if self.keys is None else self.keys.shape[2]
        if n <= held:
            return
        spare = self._slots(n) - held

        def grow(
            array: mx.array | None, shape: tuple[int, ...], dtype: Any
        ) -> mx.array:
            new = mx.zeros(shape, dtype)
            return new if array is None else mx.concatenate([array, new], axis=2)

        batch, n_kv_heads = keys.shape[:2]
        rows = (batch, n_kv_heads, spare)
        self.keys = grow(self.keys, (*rows, keys.shape[3]), keys.dtype)
        self.values = grow(self.values, (*rows, values.shape[3]), values.dtype)
        choosers = (batch, n_kv_heads if self.rule.per_head else 1, spare)
        if self._positions is not None:
            self._positions = grow(self._positions, choosers, mx.int32)
        if self.rule.memory:
            self._scores = grow(self._scores, choosers, mx.float32)
        if self.rule.value_weighted:
            self._norms = grow(self._norms, rows, mx.float32)

    def _write(self, array: mx.array, rows: mx.array, start: int) -> mx.array:
        """Put rows into the victim's slot, or from slot `start` on, in place."""
        if self._victim is None or self._victim.size == 1:
            slot = mx.array([start]) if self._victim is None else self._victim
            return mx.slice_update(array, rows, slot.reshape(1), (2,))
        slot = self._victim.reshape(*self._victim.shape, *[1] * (rows.ndim - 3))
        return mx.put_along_axis(array, mx.broadcast_to(slot, rows.shape), rows, axis=2)

    def _order(self) -> mx.array | None:
        """Slots held in order of position [B, H', size()]; None: the first ones."""
        if self._victim is None:
            return None
        assert self._positions is not None
        slots = mx.arange(self._positions.shape[2])
        last = mx.where(slots == self._victim, 2**31 - 1, self._positions)
        return mx.argsort(last, axis=-1)[..., : self.size()]

    def _held(self, array: mx.array, order: mx.array | None) -> mx.array:
        if order is None:
            return array[:, :, : self.size()]
        return gather(array, order)

    def _held_positions(self, order: mx.array | None) -> mx.array:
        assert self.keys is not None
        if self._positions is None:
            choosers = self.keys.shape[1] if self.rule.per_head else 1
            shape = (self.keys.shape[0], choosers, self.size())
            return mx.broadcast_to(mx.arange(self.size(), dtype=mx.int32), shape)
        return self._held(self._positions, order)

    def _check_rows(self, keys: mx.array) -> None:
        if self.keys is None:
            return
        held = self.keys
        if (keys.shape[:2], keys.shape[3]) != (held.shape[:2], held.shape[3]):
            raise CacheStateError(
                f"{self.rule.policy}: keys {list(keys.shape)} do not fit a cache of "
                f"{list(held.shape)}. Use a new cache for another model or batch."
            )


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
    ):
        super().__init__(
            max_size,
            "tova",
            granularity=granularity,
            n_sinks=n_sinks,
            n_recent=n_recent,
            prefill=prefill,
        )


def newest_weights(
    queries: mx.array,
    keys: mx.array,
    scale: float,
    mask: Any,
    sinks: mx.array | None,
) -> mx.array:
    """The newest query's softmax weights, float32 [B, n_kv_heads, G, S].

    queries: [B, n_heads, 1, head_dim]; keys: [B, n_kv_heads, S, head_dim].
    """
    batch, n_heads, _, head_dim = queries.shape
    n_kv_heads, slots = keys.shape[1:3]
    grouped = (batch, n_kv_heads, n_heads // n_kv_heads)
    queries = queries.astype(mx.float32).reshape(*grouped, head_dim) * scale
    logits = queries @ keys.astype(mx.float32).swapaxes(2, 3)
    if isinstance(mask, mx.array):
        mask = mx.broadcast_to(mask, (batch, n_heads, 1, slots)).reshape(logits.shape)
        if mask.dtype == mx.bool_:
            logits = mx.where(mask, logits, -mx.inf)
        else:
            logits = logits + mask.astype(mx.float32)
    if sinks is None:
        return mx.softmax(logits, axis=-1, precise=True)
    learned = sinks.astype(mx.float32).reshape(1, n_kv_heads, -1, 1)
    learned = mx.broadcast_to(learned, (*grouped, 1))
    joined = mx.concatenate([learned, logits], axis=-1)
    return mx.softmax(joined, axis=-1, precise=True)[..., 1:]


def _l2_norms(values: mx.array) -> mx.array:
    return mx.linalg.norm(values.astype(mx.float32), axis=-1)
