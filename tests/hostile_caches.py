"""Saved caches that were damaged, or written by somebody who means harm.

Whole ones come from the worlds of tests/machine.py, each with its float64 oracle. A
file that loads must hold what the whole one held, to the bit; or, if it was put
together anew and has no checksum, it must be a cache that the oracle can go on with:
`adopted` builds one from what the cache says that it holds.
"""

import copy
import json
import random
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from adopted import adopt, check_held, world_of
from hostile import RIGHT, Kind, Outcome, mutated_bytes, refused
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
    arrays = [a for a in (slots.scores, slots.value_norms) if a is not None]
    recall = slots.recall
    for rows in (slots, recall and recall.archive, recall and recall.joined()):
        if rows is not None and rows.keys is not None:
            arrays += map(dequantized, (rows.keys, rows.values))
    return all(a.dtype == mx.float32 and mx.abs(a).max() < 16 for a in arrays)


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


# What is done to arrays and texts

NUMBERS: list[Any] = [
    *[None, True, False, -1, 0, 1, 2, 3, 4, 5, 8, 16, 32, 64, 256, 4096, 2**31 - 1],
    *[2**31, 2**40, 10**30, 10**400, 0.5, -0.5, 1e300, float("nan"), float("inf")],
    *["", "tova", "head", "layer", "once", "full", "window", "streaming", "x" * 10**5],
    *[[], [4, 4], [1] * 1000, {}, {"policy": "tova"}],
]


def config_of(arrays: dict[str, Any], layer: str) -> tuple[str, dict[str, Any]] | None:
    """The name of a layer's text and what it says."""
    names = [n for n in arrays if n.startswith(f"{layer}.") and n.count(".") == 1]
    if not names:
        return None
    last = max(names, key=lambda n: n.split(".")[1].zfill(20))
    with suppress(ValueError, TypeError):
        return last, json.loads("".join(map(chr, arrays[last].tolist())))
    return None


def mutated_parts(whole: Whole, other: Whole, dice: random.Random) -> Any:
    """How, arrays and texts, a few of them changed; without a checksum."""
    arrays = dict(whole.arrays)
    texts = {n: t for n, t in whole.texts.items() if n != "0.tova_mlx_sum"}
    done = []
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        change = dice.choice(
            [of_config, of_config, of_config, of_array, of_array, of_array]
            + [of_names, of_texts, of_other]
        )
        done.append(change(arrays, texts, other, dice))
    return " and ".join(done), arrays, texts


def of_config(arrays, texts, other, dice):
    found = config_of(arrays, dice.choice("01"))
    if found is None:
        return "nothing"
    name, config = found
    if not isinstance(config, dict):
        return "nothing"
    below = [config.get(key) for key in ("rule", "rule", "recall")]
    place = dice.choice([config, config, *(b for b in below if isinstance(b, dict))])
    if isinstance(when := config.get("renumbering"), list) and dice.random() < 0.2:
        return of_rotation(when, arrays, name, config, dice)
    key = dice.choice([*place, "pinned", "recall", "renumbering", "shift"])
    value = copy.deepcopy(dice.choice(NUMBERS))
    if isinstance(place.get(key), int) and dice.random() < 0.5:
        value = place[key] + dice.choice([-1, 1, 16, -16])
    if isinstance(place.get(key), list) and dice.random() < 0.8:
        value = copy.deepcopy(place[key])
        inner = value[-1] if value and isinstance(value[-1], list) else value
        inner = inner or [0]
        inner[dice.randrange(len(inner))] = copy.deepcopy(dice.choice(NUMBERS))
    place[key] = value
    if dice.random() < 0.1:
        del place[key]
    arrays[name] = text_of(config)
    return f"config {key}"


def of_rotation(when, arrays, name, config, dice):
    """What says how keys are rotated."""
    if isinstance(when[-1], list) and dice.random() < 0.3:
        numbers = [0.0, 1.0, -1, 1e-300, 1e300, float("nan"), float("inf"), 10**400]
        half = dice.choice([1, 4, 16])
        when[-1][2], when[-1][4] = None, [dice.choice(numbers)] * half
    else:
        place = dice.choice([when, when[-1] if isinstance(when[-1], list) else when])
        place[dice.randrange(len(place))] = copy.deepcopy(dice.choice(NUMBERS))
    arrays[name] = text_of(config)
    return "config rotation"


def text_of(config: Any) -> mx.array:
    return mx.array([ord(c) for c in json.dumps(config)])


def of_array(arrays, texts, other, dice):
    name = dice.choice(list(arrays))
    arrays[name] = mutated_array(arrays[name], dice)
    return "array"


def mutated_array(array: mx.array, dice: random.Random) -> mx.array:
    kind = dice.randrange(9)
    types = [mx.float16, mx.bfloat16, mx.float32, mx.int32, mx.uint32, mx.int64]
    if kind == 0:
        return array.astype(dice.choice([*types, mx.bool_, mx.complex64, mx.uint8]))
    if array.ndim == 0:
        numbers = [-1, 0, 1, 5, 2**31 - 1, 2**31, 2**40, -(2**40), 0.5, float("nan")]
        return mx.array(dice.choice([*numbers, array.item() + 1, array.item() - 1]))
    axis = dice.randrange(array.ndim)
    if kind == 1:
        n = dice.randrange(array.shape[axis] + 1)
        return mx.take(array, mx.arange(n), axis=axis)
    if kind == 2:
        return mx.concatenate([array, array], axis=axis)
    if kind == 3:
        return mx.contiguous(array.swapaxes(0, axis))
    if kind == 4:
        return array + mx.array(dice.choice([1, -1, 100]), array.dtype)
    if kind == 5:
        return array.reshape(dice.choice([(-1,), (1, *array.shape), (*array.shape, 1)]))
    if not array.size:
        return mx.zeros(dice.choice([(1,), (1, 1, 0), (2, 1, 4), (1, 2, 4, 32)]))
    changed = np.array(array.reshape(-1).astype(array.dtype)).copy()
    index = dice.randrange(len(changed))
    if changed.dtype == np.bool_:
        changed = changed.view(np.uint8)
        changed[index] = dice.choice([0, 1, 7, 255])
        return mx.array(changed.view(np.bool_)).reshape(array.shape)
    if np.issubdtype(changed.dtype, np.floating):
        new = dice.choice([0.0, 1.0, np.nan, np.inf, -np.inf, -1.0, 1e30, 6e4])
    else:
        near = int(changed[index]) + dice.choice([-1, 1])
        known = int(dice.choice(changed))
        new = dice.choice([0, 1, 5, 12, 10**6, 2**31 - 1, near, known, -1])
        info = np.iinfo(changed.dtype)
        new = min(max(new, info.min), info.max)
    with np.errstate(over="ignore"):
        changed[slice(None) if kind == 8 else index] = new
    return mx.array(changed).reshape(array.shape)


def of_names(arrays, texts, other, dice):
    name = dice.choice(list(arrays))
    kind = dice.randrange(5)
    if kind == 0:
        del arrays[name]
        return "array missing"
    if kind == 1:
        new = dice.choice(["0.99", "0.999999999", "7.0", "a", "", "0.0.0.0", "0..0"])
        arrays[new] = arrays[name]
        return "array more"
    if kind == 2:
        new = ".".join(["0"] * dice.choice([50, 2000, 30_000]))
        arrays[new] = mx.zeros((1,))
        return "array deep"
    if kind == 3:
        one, two = dice.choice(list(arrays)), name
        arrays[one], arrays[two] = arrays[two], arrays[one]
        return "arrays swapped"
    arrays[dice.choice(["-1.0", "0.-1", "0.1e3", "0.٣", "0. 1", "1_0.0"])] = arrays[
        name
    ]
    return "array of a strange name"


def of_texts(arrays, texts, other, dice):
    name = dice.choice(list(texts))
    kind = dice.randrange(5)
    if kind == 0:
        del texts[name]
        return "text missing"
    if kind == 1:
        kinds = ["KVCache", "RotatingKVCache", "QuantizedKVCache", "ArraysCache"]
        kinds += ["CacheList", "ChunkedKVCache", "BatchKVCache", "TOVACache"]
        texts[f"1.{dice.choice('01')}"] = dice.choice([*kinds, "nn", "", "Any"])
        return "another class"
    if kind == 2:
        texts[name] = dice.choice(["", "x" * 10**6, "\0", "scalar", "none", "string"])
        return "text"
    if kind == 3:
        new = dice.choice(["1.5", "1.99999999", "2.1.1", "9", "2.999999.0", "0.a.b"])
        texts[new] = texts[name]
        return "text more"
    for i in range(dice.choice([100, 20_000])):
        texts[f"0.n{i}"] = "a"
    return "many texts"


def of_other(arrays, texts, other, dice):
    """What another saved cache has there."""
    name = dice.choice(list(other.arrays))
    layer = name.split(".")[0]
    if dice.random() < 0.5:
        arrays[name] = other.arrays[name]
        return "array of another"
    for n in [n for n in arrays if n.split(".")[0] == layer]:
        del arrays[n]
    theirs = {n: a for n, a in other.arrays.items() if n.split(".")[0] == layer}
    arrays.update(theirs)
    return "layer of another"


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
