"""Worlds of tests/machine.py for caches that nobody saw being filled.

Each cache's oracle is made of what the cache says that it holds. From there on both
read the same, so that all that a world checks is checked of a cache out of any file.
"""

import copy
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from machine import LAYERS, Setup, World, plain
from oracle import Held, Token

from tova_mlx import PolicyKVCache
from tova_mlx.caches.lockstep import keep_together
from tova_mlx.storage.entries import dequantized, gather

# What came long ago, as an oracle counts the steps at which tokens were evicted.
LONG_AGO = -(10**9)


class Sparse:
    """A list of which only some items are known; `n`: how long it begins."""

    def __init__(self, n: int, items: dict[int, Any]):
        self.n, self.items = n, items

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        return self.items[i]

    def append(self, item: Any) -> None:
        self.items[self.n] = item
        self.n += 1

    def __delitem__(self, which: slice) -> None:
        self.n = min(self.n, which.start)


class Past(Sparse):
    """What an oracle remembers; of before it was made, what can still be told.

    That is who was there: those held, and who was evicted by the newest token.
    """

    def __init__(self, cache: PolicyKVCache, oracle: Any, victims: list[list[Held]]):
        super().__init__(cache.seen, {})
        self.shift, self.evicted = cache.seen - cache.offset, oracle.evicted
        self.held = [
            sorted([*held, *more], key=lambda h: h.position)
            for held, more in zip(copy.deepcopy(oracle.held), victims, strict=True)
        ]

    def __getitem__(self, i: int) -> Any:
        if i in self.items:
            return self.items[i]
        held = [[h for h in held if h.position < i] for held in self.held]
        there = [{h.position for h in here} for here in held]
        evicted = [
            {p: s for p, s in known.items() if p < i and p not in here}
            for known, here in zip(self.evicted, there, strict=True)
        ]
        return max(0, i - self.shift), copy.deepcopy(held), evicted


def world_of(cache: PolicyKVCache, setup: Setup) -> World:
    """A world of one cache without oracles.

    setup: of the heads and widths that it will be fed.
    """
    world = World.__new__(World)
    slots = cache.slots
    world.setup = replace(
        setup,
        journal=cache.journal,
        prefill=cache.prefill,
        shares=cache.shares,
        batch=setup.batch if cache.empty() else cache.keys.shape[0],
        period=slots.renumbering.period if slots.renumbering else 0,
    )
    world.storages, world.next_uid = [slots.storage] * LAYERS, 0
    world.caches, world.floor = [cache], cache.seen
    keep_together(world.caches)
    return world


def adopt(cache: PolicyKVCache, setup: Setup) -> World:
    """The world of a cache, with oracles that go on from what it holds."""
    world = world_of(cache, setup)
    rows = range(world.setup.batch)
    world.oracles = [[Adoption(world, cache, row).oracle for row in rows]]
    return world


def check_held(cache: PolicyKVCache) -> None:
    """What no cache can be without, by its own words only."""
    positions, limit = np.array(cache.positions), cache.rule.max_size
    want = cache.seen if limit is None else min(cache.seen, limit)
    assert positions.shape[-1] == cache.size() == want
    assert (np.diff(positions) > 0).all()
    if cache.empty():
        return
    assert positions.min() >= 0
    assert positions.max() < cache.seen
    for rows in cache.keys_and_values():
        assert mx.isfinite(dequantized(rows)).all().item()


class Adoption:
    """The oracle of one row of a cache."""

    def __init__(self, world: World, cache: PolicyKVCache, row: int):
        self.setup, self.slots, self.row = world.setup, cache.slots, row
        self.oracle, self.tokens = world.oracle(), {}
        self._rules(world, cache)
        self.oracle.tokens = Sparse(cache.seen, self.tokens)
        none: list[list[Held]] = [[] for _ in self.oracle.choosers]
        self.oracle.held = copy.deepcopy(none)
        self.oracle.evicted = [{} for _ in none]
        if not cache.empty():
            none = self._rows(cache)
        self.oracle.past = Past(cache, self.oracle, none)

    def _rules(self, world: World, cache: PolicyKVCache) -> None:
        oracle, (n_heads, n_kv_heads) = self.oracle, self.setup.heads
        oracle.rule, recall = self.slots.rule.as_dict(), self.slots.recall
        oracle.recalls = recall is not None
        heads = np.arange(n_heads)
        per_head = self.slots.rule.per_head
        oracle.choosers = np.split(heads, n_kv_heads) if per_head else [heads]
        oracle.next = cache.offset

    def _rows(self, cache: PolicyKVCache) -> list[list[Held]]:
        """Learn all rows; those of the victim are returned."""
        slots, now, oracle = self.slots, cache.seen, self.oracle
        order = slots.order()
        known = (slots.scores, slots.value_norms, slots.rotary)
        scores, norms, rotary = (slots._held(a, order) for a in known)
        oracle.held = self._learn(
            cache.positions, slots.held_entries(), scores, norms, rotary
        )
        recall, victims = slots.recall, [[] for _ in oracle.choosers]
        if recall is not None and recall.archive.count:
            rows = recall.archive.synced().rows()
            self._evicted(self._learn(rows.positions, rows[:2]), LONG_AGO)
        if recall is not None and (rows := recall.waiting) is not None:
            self._evicted(self._learn(rows.positions, rows[:2]), LONG_AGO)
        if slots.victim is not None:
            places = (slots.keys_to_read, slots.values)
            rows = [gather(e, slots.victim) for e in places]
            known = (slots.positions, None, slots.value_norms, slots.rotary)
            positions, *others = (
                None if a is None else gather(a, slots.victim) for a in known
            )
            victims = self._learn(positions, rows, *others)
            self._evicted(victims, now - 1)
        return victims

    def _evicted(self, rows: list[list[Held]], step: int) -> None:
        for known, new in zip(self.oracle.evicted, rows, strict=True):
            known.update({h.position: step for h in new})

    def _learn(
        self,
        positions: Any,
        entries: Any,
        scores: Any = None,
        norms: Any = None,
        rotary: Any = None,
    ) -> list[list[Held]]:
        """Know these tokens from now on; those of each chooser."""
        keys, values = (plain(e)[self.row].astype(np.float64) for e in entries)
        places = np.array(positions)[self.row]
        turns = places if rotary is None else np.array(rotary)[self.row]
        scored = np.zeros(places.shape)
        if scores is not None:
            scored = np.array(scores)[self.row].astype(np.float64)
        lengths = np.linalg.norm(values, axis=-1)
        if norms is not None:
            lengths = np.array(norms)[self.row].astype(np.float64)
        setup, found = self.setup, []
        group = setup.heads[0] // setup.heads[1]
        for c, heads in enumerate(self.oracle.choosers):
            kv = sorted({int(h) // group for h in heads})
            found.append([])
            for i, position in enumerate(places[c].tolist()):
                token = self._token(position, keys.shape[-1], values.shape[-1])
                rows, turn = keys[kv, i], int(turns[c, i])
                if setup.period:
                    # An oracle is told keys before they are rotated.
                    rows = np.array([setup.rotate(key, -turn) for key in rows])
                token.key[kv], token.value[kv] = rows, values[kv, i]
                token.norm[kv] = lengths[kv, i]
                found[c].append(Held(position, float(scored[c, i]), turn))
        return found

    def _token(self, position: int, *widths: int) -> Token:
        if position not in self.tokens:
            heads = self.setup.heads[1]
            key, value = (np.zeros((heads, width)) for width in widths)
            self.tokens[position] = Token(-1, key, value, np.zeros(heads))
        return self.tokens[position]
