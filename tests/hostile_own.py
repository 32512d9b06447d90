"""Saved caches of mlx-lm's own kinds, as a model without us leaves them, changed."""

import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from hostile import RIGHT, Kind, Outcome, refused
from hostile_parts import mutated_array
from mlx_lm.models import cache as mlx_lm_cache

from tova_mlx import load_prompt_cache
from tova_mlx.errors import TovaError

HEADS, WIDTH = 2, 32


def rows(n: int, seed: int) -> tuple[mx.array, mx.array]:
    """Keys and values of n tokens."""
    dice = np.random.default_rng(seed)
    shape = (2, 1, HEADS, n, WIDTH)
    keys, values = dice.normal(size=shape).astype(np.float32)
    return mx.array(keys), mx.array(values)


def used() -> list[list[Any]]:
    """Lists of one cache or two, after some tokens."""
    made: list[list[Any]] = [
        [mlx_lm_cache.KVCache()],
        [mlx_lm_cache.QuantizedKVCache(32, 8)],
        [mlx_lm_cache.RotatingKVCache(8, keep=2)],
        [mlx_lm_cache.RotatingKVCache(64)],
        [mlx_lm_cache.ChunkedKVCache(16)],
        [mlx_lm_cache.CacheList(mlx_lm_cache.KVCache(), mlx_lm_cache.KVCache())],
    ]
    for i, caches in enumerate(made):
        for cache in leaves(caches):
            for n in (9, 1, 1):
                cache.update_and_fetch(*rows(n, i))
    arrays = mlx_lm_cache.ArraysCache(2)
    arrays[0], arrays[1] = mx.ones((1, 3, 4)), mx.ones((1, 2, 4, 4))
    return [*made, [arrays, made[0][0]]]


def leaves(caches: list[Any]):
    for cache in caches:
        yield from getattr(cache, "caches", (cache,))


class OwnCaches:
    def make(self, place: Path) -> None:
        self.place, self.whole = place, []
        for i, caches in enumerate(used()):
            path = place / f"{i}.safetensors"
            mlx_lm_cache.save_prompt_cache(str(path), caches)
            named: Any = mx.load(str(path), return_metadata=True)
            mx.eval(named[0])
            self.whole.append(named)

    def try_one(self, dice: random.Random) -> Outcome:
        arrays, texts = (dict(part) for part in dice.choice(self.whole))
        for _ in range(dice.choice([1, 1, 2])):
            name = dice.choice(list(arrays))
            arrays[name] = mutated_array(arrays[name], dice)
            if dice.random() < 0.1:
                arrays[name] = dice.choice(list(arrays.values()))
            if dice.random() < 0.1:
                texts[f"2.{dice.randint(1, 8)}.1"] = dice.choice(["none", "scalar"])
            if dice.random() < 0.05:
                del arrays[name]
                break
        path = self.place / "hostile.safetensors"
        try:
            mx.save_safetensors(str(path), arrays, texts)
        except (ValueError, TypeError, RuntimeError):
            return self.try_one(dice)
        try:
            caches, _ = load_prompt_cache(path)
        except TovaError as error:
            return refused("arrays of mlx-lm's own", error)
        for cache in leaves(caches):
            go_on(cache)
        return Outcome("arrays of mlx-lm's own", RIGHT)


def go_on(cache: Any) -> None:
    """Tokens can be read, and what is given back has them at its end."""
    if isinstance(cache, mlx_lm_cache.ArraysCache):
        assert all(a is None or isinstance(a, mx.array) for a in cache.cache)
        return
    if cache.empty():
        assert not cache.offset
        return
    keys, values = cache.keys, cache.values
    shapes = [getattr(a, "shape", None) for a in (keys, values)]
    if isinstance(cache, mlx_lm_cache.QuantizedKVCache):
        shapes = [
            (*k[0].shape[:3], k[0].shape[3] * 32 // cache.bits) for k in (keys, values)
        ]
    before = cache.offset
    for n in (1, 3, 1):
        new = [mx.ones((*s[:2], n, s[3])) for s in shapes]
        got = cache.update_and_fetch(*new)
        if not isinstance(cache, mlx_lm_cache.QuantizedKVCache):
            mx.eval(got)
            assert all(bool(mx.isfinite(a).all()) for a in got)
            assert all(a.shape[2] >= n for a in got)
    assert cache.offset == before + 5
    if cache.is_trimmable():
        assert cache.trim(2) == 2


def kinds() -> list[Kind]:
    files = OwnCaches()
    return [Kind("saved cache of mlx-lm's own", files.make, files.try_one)]
