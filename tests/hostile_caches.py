"""Saved caches that were damaged, or written by somebody who means harm.

Whole ones come from the worlds of tests/machine.py, each with its float64 oracle. A
file that loads must hold what the whole one held, to the bit; or, if it was put
together anew and has no checksum, it must be a cache that the oracle can go on with:
`adopted` builds one from what the cache says that it holds.
"""

import copy
import random
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from adopted import adopt, check_held, world_of
from hostile import RIGHT, Kind, Outcome, mutated_bytes, refused
from hostile_parts import mutated_parts
from machine import LAYERS, Setup, World
from mlx.utils import tree_flatten
from mlx_lm.models import cache as mlx_lm_cache

from tova_mlx import PolicyKVCache, load_prompt_cache, save_prompt_cache
from tova_mlx.caches.lockstep import keep_together
from tova_mlx.errors import TovaError
from tova_mlx.storage.entries import dequantized

# Every policy, bits, batch, compact positions, journal, recall; and how much was read.
SETUPS = [
    (Setup("tova"), [3]),
    (Setup("tova", 5), [11, 1, 1]),
    (Setup("tova", 9, (("n_sinks", 2), ("n_recent", 3))), [20, 1]),
    (Setup("tova", 6, (("granularity", "head"),), batch=2), [9, 1, 1]),
    (Setup("tova", 7, kv_bits=4), [12, 1]),
    (Setup("tova", 6, kv_bits=(8, 4), journal=3), [9, 1]),
    (Setup("tova", 6, period=8), [21, 1, 1]),
    (Setup("tova", 5, recall=16), [40, 1]),
    (Setup("tova", 5, recall=32, kv_bits=8), [30, 1, 1]),
    (Setup("tova", 5, prefill="once"), [12, 1]),
    (Setup("tova", 8, pin=3), [14, 1]),
    (Setup("fade", 9, (("n_recent", 3),)), [17, 1, 1]),
    (Setup("fade", 6, (("granularity", "head"),), kv_bits=8), [13, 1]),
    (Setup("h2o", 8, heads=(3, 3)), [15, 1]),
    (Setup("h2o", 8, batch=2), [5]),
    (Setup("tova", 6, (("value_weighted", True),)), [11, 1, 1]),
    (Setup("vatp", 6), [13, 1]),
    (Setup("vatp", 9, (("n_sinks", 0), ("n_recent", 2)), recall=16), [33, 1]),
    (Setup("keydiff", 6), [14, 1]),
    (Setup("keydiff", 5, period=3), [14, 1, 1]),
    (Setup("streaming", 7), [18, 1]),
    (Setup("streaming", 8, period=8, pin=2), [20, 1]),
    (Setup("streaming", 9, recall=16), [50]),
    (Setup("window", 6, dims=(6, 10)), [13, 1, 1]),
    (Setup("window", 5, shares=True), [4]),
    (Setup("full", 9), [17]),
    (Setup("full", 9, kv_bits=4), [11, 1]),
]


class Whole:
    """A world, its file, and the arrays and texts in it; journal and all."""

    def __init__(self, setup: Setup, lengths: list[int], place: Path, whose: str):
        self.world = World(setup)
        for n in lengths:
            self.world.read(n)
        path = place / f"{len(list(place.iterdir()))}.safetensors"
        if whose == "ours":
            save_prompt_cache(path, self.world.caches, metadata={"title": "a"})
        else:
            mlx_lm_cache.save_prompt_cache(str(path), self.world.caches, {"title": "a"})
        self.checked, self.data = whose == "ours", path.read_bytes()
        named: Any = mx.load(str(path), return_metadata=True)
        self.arrays, self.texts = named
        mx.eval(self.arrays)
        self.state = states(load_prompt_cache(path)[0])


def states(caches: list[Any]) -> list[tuple[str, Any]]:
    """All that caches hold, named, as bytes and shapes."""
    flat: Any = tree_flatten([c.state for c in caches])
    return [(name, of_bytes(value)) for name, value in flat]


def of_bytes(value: Any) -> Any:
    if not isinstance(value, mx.array):
        return value
    flat = mx.contiguous(value.reshape(-1)).view(mx.uint8)
    return str(value.dtype), tuple(value.shape), bytes(np.array(flat))


class SavedCaches:
    """One input after the other."""

    def make(self, place: Path) -> None:
        self.place = place
        self.whole = [
            Whole(setup, lengths, place, whose)
            for setup, lengths in SETUPS
            for whose in ("ours", "mlx-lm")
        ]

    def try_bytes(self, dice: random.Random) -> Outcome:
        """Bytes are changed; with a checksum nothing else than the whole may load."""
        whole = dice.choice(self.whole)
        others = [dice.choice(self.whole).data for _ in range(2)]
        how, data = mutated_bytes(whole.data, others, dice)
        path = self.place / "hostile.safetensors"
        path.write_bytes(data)
        return self.judge(how, path, whole, dice, same=whole.checked)

    def try_parts(self, dice: random.Random) -> Outcome:
        """A valid safetensors file of other arrays and texts."""
        whole = dice.choice(self.whole)
        how, arrays, texts = mutated_parts(whole, dice.choice(self.whole), dice)
        path = self.place / "hostile.safetensors"
        try:
            mx.save_safetensors(str(path), arrays, texts)
        except (ValueError, TypeError, RuntimeError, UnicodeError):
            # MLX cannot write it.
            return self.try_parts(dice)
        return self.judge(how, path, whole, dice, same=False)

    def judge(
        self, how: str, path: Path, whole: Whole, dice: random.Random, *, same: bool
    ) -> Outcome:
        try:
            caches, _ = load_prompt_cache(path)
            got = states(caches)
        except Exception as error:
            return refused(how, error)
        equal = got == whole.state
        assert equal or not same, f"{how}: another cache than was saved"
        try:
            if equal:
                world = copy.deepcopy(whole.world)
                world.caches, world.floor = caches, world.offset
                keep_together(caches)
                go_on(world, dice)
                return Outcome(how, RIGHT, "whole")
            for cache in caches[:LAYERS]:
                assert isinstance(cache, PolicyKVCache), type(cache)
                check_held(cache)
                if fits(cache, whole.world.setup):
                    go_on(adopt(cache, whole.world.setup), dice)
                else:
                    go_on_alone(world_of(cache, whole.world.setup))
        except TovaError as error:
            return refused(how, error)
        return Outcome(how, RIGHT, "another")


def fits(cache: PolicyKVCache, setup: Setup) -> bool:
    """Whether the oracle's world can feed a cache: not another rotation than its own.

    Nor another type, or numbers so large that float32 is far from what they come to.
    """
    when, slots = cache.slots.renumbering, cache.slots
    own = setup.make().slots.renumbering
    if (when and when.rotation) != (own and own.rotation):
        return False
    limits = [(a, 16) for a in (slots.scores, slots.value_norms) if a is not None]
    recall = slots.recall
    for rows in (slots, recall and recall.archive, recall and recall.waiting):
        if rows is not None and rows.keys is not None:
            # By larger keys the least weights are 0 in float32, and all alike.
            limits += [(dequantized(rows.keys), 3), (dequantized(rows.values), 16)]
            lengths = mx.linalg.norm(limits[-2][0].astype(mx.float32), axis=-1)
            if lengths.min() < 1e-3:
                # No direction in float32.
                return False
    return all(a.dtype == mx.float32 and mx.abs(a).max() < n for a, n in limits)


def go_on_alone(world: World) -> None:
    """A few steps that no oracle follows: numbers come out, and as many are held."""
    for n in (1, 1, 3, 9):
        rows = [world.uids(n) for _ in range(world.setup.batch)]
        for outputs in world.forward(world.caches, rows, None):
            assert all(np.isfinite(a).all() for a in outputs)
        check_held(world.caches[0])
    with tempfile.TemporaryDirectory() as place:
        path = save_prompt_cache(Path(place) / "a", world.caches)
        check_held(load_prompt_cache(path)[0][0])


def go_on(world: World, dice: random.Random) -> None:
    """A few steps, each checked by the oracle; a save and a load among them."""
    world.check()
    for _ in range(2):
        step = dice.randrange(5)
        if step == 0:
            world.trim(dice.choice([1, 1, 2, 10**6]))
        elif step == 1:
            world.store(dice.choice(["ours", "mlx-lm", "state"]))
        elif step == 2:
            world.read(dice.choice([2, 5, 17]))
        else:
            world.decode(2)
        world.check()


def kinds() -> list[Kind]:
    files = SavedCaches()
    made = []

    def make(place: Path) -> None:
        if not made:
            made.append(place)
            files.make(place)

    return [
        Kind("saved cache, bytes", make, files.try_bytes),
        Kind("saved cache, parts", make, files.try_parts),
    ]
