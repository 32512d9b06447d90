"""What is done to the arrays and texts of a saved cache, which is then written anew."""

import copy
import json
import random
from contextlib import suppress
from typing import Any

import mlx.core as mx
import numpy as np

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


def mutated_parts(whole: Any, other: Any, dice: random.Random) -> Any:
    """How, arrays and texts, a few of them changed; without a checksum.

    whole, other: what has `arrays` and `texts` of a file.
    """
    arrays = dict(whole.arrays)
    texts = {n: t for n, t in whole.texts.items() if n != "0.tova_mlx_sum"}
    done = []
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        change = dice.choice(
            [*[of_config] * 3, *[of_array] * 3, of_names, of_texts, of_other]
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
