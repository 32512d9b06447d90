"""A saved prompt goes on to the bit where it was, or is refused with the reason."""

import copy
import json
import random
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
import zoo
from mlx.utils import tree_map
from mlx_lm.models import cache as mlx_lm_cache
from test_cache import CASES, EXTRA

from tova_mlx import (
    PolicyKVCache,
    TOVACache,
    convert,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from tova_mlx.caches.refusals import check_entries
from tova_mlx.errors import CacheStateError, OptionError
from tova_mlx.hooks import dispatcher
from tova_mlx.models.saved import fingerprint, prompt_path

SIZES = [19, 1, 1, 1]
NAMES = [
    "keys",
    "values",
    "positions",
    "scores",
    "norms",
    "victim",
    "offset",
    "config",
]


@pytest.fixture(scope="module")
def model():
    return tiny.make()


def read(model, size=12, **options):
    """Caches after 22 tokens, the last three decoded."""
    caches = make_prompt_cache(model, size, **options)
    tiny.feed(model, tiny.tokens(22), caches, SIZES)
    return caches


def go_on(model, caches):
    logits = tiny.feed(model, tiny.tokens(12, seed=5), caches, [5, 1, 1, 1, 4])
    return np.array(logits), [np.array(c.positions) for c in caches]


def same(one, other):
    return np.array_equal(one[0], other[0]) and all(
        map(np.array_equal, one[1], other[1])
    )


@pytest.mark.parametrize(("policy", "options"), CASES + EXTRA)
@pytest.mark.parametrize("size", [12, 40])
@pytest.mark.parametrize("whose", ["mlx-lm's", "ours"])
def test_what_comes_after_loading_is_the_same_to_the_bit(
    model, policy, options, size, whose, tmp_path
):
    path = tmp_path / "prompt.safetensors"
    caches = read(model, size, policy=policy, **options)
    if whose == "ours":
        save_prompt_cache(path, caches, metadata={"title": "a"})
        loaded, metadata = load_prompt_cache(path)
        assert metadata == {"title": "a"}
    else:
        mlx_lm_cache.save_prompt_cache(str(path), caches)
        loaded = mlx_lm_cache.load_prompt_cache(str(path))
    assert [c.rule for c in loaded] == [c.rule for c in caches]
    assert [c.offset for c in loaded] == [22] * 3
    assert same(go_on(model, loaded), go_on(model, caches))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("journal", [0, 5, 40])
def test_as_many_tokens_can_be_taken_back_after_loading(model, journal, tmp_path):
    save_prompt_cache(tmp_path / "a.safetensors", read(model, journal=journal))
    loaded, _ = load_prompt_cache(tmp_path / "a.safetensors")
    assert [c.journal for c in loaded] == [journal] * 3


def test_a_new_process_loads_what_another_saved(model, tmp_path):
    path = tmp_path / "prompt.safetensors"
    save_prompt_cache(path, read(model, policy="fade"))
    code = (
        "import sys, json; from tova_mlx import load_prompt_cache\n"
        "caches, _ = load_prompt_cache(sys.argv[1])\n"
        "print(json.dumps([c.positions.tolist() for c in caches]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    kept = [c.positions.tolist() for c in read(model, policy="fade")]
    assert json.loads(done.stdout) == kept


def test_an_empty_cache_is_saved_and_loaded(model, tmp_path):
    save_prompt_cache(tmp_path / "a.safetensors", make_prompt_cache(model, 12))
    loaded, _ = load_prompt_cache(tmp_path / "a.safetensors")
    assert all(c.empty() for c in loaded)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_refused(model, share, tmp_path):
    path = tmp_path / "prompt.safetensors"
    save_prompt_cache(path, read(model))
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CacheStateError, match="not a whole saved prompt"):
        load_prompt_cache(path)


def test_files_that_do_not_fit_the_model_are_refused(model, tmp_path):
    path = tmp_path / "prompt.safetensors"
    save_prompt_cache(path, read(model), model=model)
    user = tiny.make()
    convert(user, 12)
    load_prompt_cache(path, model=user)
    convert(user, 13)
    with pytest.raises(CacheStateError, match=r"max_size=12.*max_size=13"):
        load_prompt_cache(path, model=user)
    convert(user, 12, policy="fade")
    with pytest.raises(CacheStateError, match=r"policy=tova.*policy=fade"):
        load_prompt_cache(path, model=user)
    convert(user, 12, prefill="once")
    with pytest.raises(CacheStateError, match=r"prefill=stepwise.*prefill=once"):
        load_prompt_cache(path, model=user)
    other = tiny.make(seed=7)
    convert(other, 12)
    with pytest.raises(CacheStateError, match="another model"):
        load_prompt_cache(path, model=other)
    save_prompt_cache(path, read(model))
    wider = tiny.make(n_heads=8, n_kv_heads=4)
    convert(wider, 12)
    with pytest.raises(CacheStateError, match=r"2 heads of 8 .*but.*4 heads of 8"):
        load_prompt_cache(path, model=wider)
    convert(user, 12)
    narrow = read(model)
    for cache in narrow:
        cache.slots.values = cache.slots.values[..., :4]
    save_prompt_cache(path, narrow)
    with pytest.raises(CacheStateError, match=r"2 heads of 4, but.*2 heads of 8"):
        load_prompt_cache(path, model=user)
    half = read(model)
    for cache in half:
        cache.slots.keys = cache.slots.keys.astype(mx.float16)
        cache.slots.values = cache.slots.values.astype(mx.float16)
    save_prompt_cache(path, half)
    with pytest.raises(CacheStateError, match=r"values .*float16.*values .*float32"):
        load_prompt_cache(path, model=user)
    apart = read(model)
    tiny.feed(model, tiny.tokens(1), another := read(model), 1)
    save_prompt_cache(path, [*apart[:2], another[2]])
    with pytest.raises(CacheStateError, match=r"have seen \[22, 23\] tokens"):
        load_prompt_cache(path, model=user)
    save_prompt_cache(path, read(model)[:2])
    with pytest.raises(CacheStateError, match=r"2 layers, but .* has 3"):
        load_prompt_cache(path, model=user)


def set_at(name, index, value):
    """A change of one number of an array."""

    def change(state):
        array = np.array(state[name])
        array[index] = value
        state[name] = mx.array(array)

    return change


def config(**changes):
    return lambda state: state["config"].update(changes)


def rule(**changes):
    return lambda state: state["config"]["rule"].update(changes)


def of_type(name, dtype):
    return lambda state: state.update({name: state[name].astype(dtype)})


# Of a layer of FADE after 22 tokens, max_size=12, n_recent=3: 13 slots, one dead.
CANNOT_BE = [
    (config(version=99), "version 99"),
    (config(prefill="twice"), "prefill"),
    (config(prefill=["once"]), "prefill"),
    (config(shares="no"), "shares"),
    (config(journal=10**9), "journal.*at most 4096"),
    (config(journal=-1), "journal"),
    (config(journal=True), "journal"),
    (config(storage=[3, 3, 64]), "kv_bits"),
    (config(storage=[None, 4, 64]), "kv_bits"),
    (config(storage=[4, 4, 10**9]), "kv_group_size"),
    (config(storage=[None, None]), "unpack|storage"),
    (config(storage=[None, None, 8]), "storage"),
    (config(storage=[8, 8, 64]), "not quantised"),
    (config(rule=[]), "state of"),
    (lambda s: s["config"].pop("rule"), "rule"),
    (lambda s: s["config"]["rule"].pop("max_size"), "max_size"),
    (rule(policy="lru"), "lru"),
    (rule(policy=["fade"]), "hashable"),
    (rule(max_size=50), "nothing was evicted"),
    (rule(max_size=5), "13 slots"),
    (rule(max_size=12.0), "whole number"),
    (rule(memory=2), "no options give|memory"),
    (rule(memory=float("nan")), "memory"),
    (rule(reads_attention=False), "no options give"),
    (rule(n_sinks=8), "positions"),
    (lambda s: s.update(offset=-1), "tokens seen"),
    (lambda s: s.update(offset=5000.5), "tokens seen"),
    (lambda s: s.update(offset=True), "tokens seen"),
    (lambda s: s.update(offset="22"), "tokens seen"),
    (lambda s: s.update(offset=2**31 - 1), "tokens seen"),
    (lambda s: s.update(offset=2**40), "tokens seen"),
    (lambda s: s.update(offset=13), "positions"),
    (lambda s: s.update(offset=12), "nothing was evicted"),
    (lambda s: s.update(offset=23), "positions"),
    (lambda s: s.update(keys=None), "no keys"),
    (lambda s: s.update(keys=None, values=None), "no keys"),
    (lambda s: s.update(keys=s["keys"][:, 0]), "entries"),
    (lambda s: s.update(keys=[s["keys"]] * 3), "entries"),
    (lambda s: s.update(keys=s["keys"][..., :0]), "keys"),
    (of_type("keys", mx.int32), "int32"),
    (of_type("keys", mx.float16), "float16.*float32"),
    (lambda s: s.update(values=s["values"][:, :1]), "values"),
    (lambda s: s.update(scores=None), "scores are not"),
    (lambda s: s.update(scores=1.5), "scores are not"),
    (lambda s: s.update(norms=None), "norms are not"),
    (lambda s: s.update(norms=s["norms"][..., :4]), "norms are not"),
    (lambda s: s.update(norms=-s["norms"]), "norms"),
    (lambda s: s.update(victim=s["victim"] + 10_000), "past 13 slots"),
    (lambda s: s.update(victim=mx.full_like(s["victim"], 13)), "past 13 slots"),
    (lambda s: s.update(victim=s["victim"][0]), "victim are not"),
    (of_type("victim", mx.int32), "victim are not"),
    (lambda s: s.update(victim=None), "13 slots|positions"),
    (of_type("positions", mx.int64), "positions are not"),
    (lambda s: s.update(positions=None), "positions are not"),
    (lambda s: s.update(positions=s["positions"] * 0), "positions"),
    (lambda s: s.update(positions=-s["positions"]), "positions"),
    (lambda s: s.update(positions=s["positions"] + 1), "positions"),
    *[(set_at("keys", (0, 1, 2, 3), bad), "not numbers") for bad in (np.nan, np.inf)],
    *[(set_at("values", (0, 1, 2, 3), bad), "not numbers") for bad in (np.nan, np.inf)],
    *[
        (lambda s, bad=bad: s.update(scores=s["scores"] * bad), "scores that are not")
        for bad in (np.nan, np.inf)
    ],
    *[
        (lambda s, bad=bad: s.update(norms=s["norms"] * bad), "norms that are not")
        for bad in (np.nan, np.inf)
    ],
]


@pytest.mark.parametrize(("change", "message"), CANNOT_BE)
def test_a_state_that_cannot_be_is_refused(model, change, message):
    options = {"policy": "fade", "n_recent": 3, "n_sinks": 0}
    state = dict(zip(NAMES, read(model, **options)[0].state, strict=True))
    state["config"] = json.loads(state["config"])
    change(state)
    state["config"] = json.dumps(state["config"])
    with pytest.raises(CacheStateError, match=message):
        TOVACache.from_state(tuple(state.values()))


@pytest.mark.parametrize("text", ["", "[]", "3", "null", '"fade"', "[" * 100_000, b"{"])
def test_what_is_no_state_is_refused(model, text):
    state = read(model)[0].state
    for given in ((*state[:-1], text), (text,), (), None, 3, text, state[1:], [state]):
        with pytest.raises(CacheStateError, match="not the state"):
            TOVACache.from_state(given)


@pytest.mark.parametrize("policy", ["full", "tova", "window"])
def test_a_victim_where_nothing_was_evicted_is_refused(model, policy):
    cache = read(model, size=30, policy=policy)[0]
    state = [*cache.state]
    state[5] = mx.zeros((1, 1, 1), mx.uint32)
    with pytest.raises(CacheStateError, match="nothing was evicted"):
        TOVACache.from_state(tuple(state))


def test_a_token_still_to_come_is_refused(model):
    state = [*read(model, size=30)[0].state]
    positions = np.zeros((1, 1, state[0].shape[2]), np.int32)
    positions[..., :22] = range(22)
    state[2] = mx.array(positions)
    assert TOVACache.from_state(tuple(state)).seen == 22
    positions[..., 21] = 22
    state[2] = mx.array(positions)
    with pytest.raises(CacheStateError, match="positions that tova cannot hold"):
        TOVACache.from_state(tuple(state))


@pytest.mark.parametrize("policy", ["full", "tova", "window"])
def test_fewer_slots_than_tokens_are_refused(model, policy):
    state = [*read(model, size=30, policy=policy)[0].state]
    assert state[2] is None  # slot i holds token i
    state[0], state[1] = (a[:, :, :21] for a in state[:2])
    with pytest.raises(CacheStateError, match="21 slots for 22 tokens"):
        TOVACache.from_state(tuple(state))


@pytest.mark.parametrize(
    ("policy", "options", "out", "message"),
    [
        ("streaming", {"n_sinks": 4}, 2, "positions"),
        ("tova", {"n_sinks": 4}, 2, "positions"),
        ("tova", {"n_recent": 4}, 20, "positions"),
        ("window", {}, 12, "positions"),
        ("h2o", {"granularity": "layer"}, 21, "positions"),
    ],
)
def test_who_is_protected_must_be_held(model, policy, options, out, message):
    # The dead slot's token takes the place of one that cannot have left.
    cache = read(model, policy=policy, **options)[0]
    state = [*cache.state]
    slots = np.array(state[2])[0, 0]
    assert out in slots
    assert slots[state[5].item()] != out
    state[5] = mx.array(np.flatnonzero(slots == out), mx.uint32)[None, None]
    with pytest.raises(CacheStateError, match=message):
        TOVACache.from_state(tuple(state))


@pytest.mark.parametrize("policy", ["tova", "streaming"])
@pytest.mark.parametrize("dead", ["twice", "never", "later", "missing"])
def test_the_dead_slot_holds_who_left_at_the_last_step(model, policy, dead):
    # It would come back if that step were taken back.
    state = [*read(model, policy=policy)[0].state]
    slots, victim = np.array(state[2]), state[5].item()
    assert 21 in slots
    if dead == "missing":
        # A token more than the newest of all slots.
        state[6] += 1
    else:
        twice = slots[0, 0, victim - 1]
        slots[0, 0, victim] = {"twice": twice, "never": -1, "later": 22}[dead]
    state[2] = mx.array(slots)
    with pytest.raises(CacheStateError, match=f"positions that {policy}"):
        TOVACache.from_state(tuple(state))


@pytest.mark.parametrize("name", ["scores", "norms"])
def test_what_a_policy_does_not_keep_is_refused(model, name):
    state = dict(zip(NAMES, read(model)[0].state, strict=True))
    state[name] = mx.zeros((1, 1 if name == "scores" else 2, 13))
    with pytest.raises(CacheStateError, match=f"{name}, but tova has none"):
        TOVACache.from_state(tuple(state.values()))


@pytest.mark.parametrize(("policy", "options"), CASES + EXTRA)
@pytest.mark.parametrize("kv_bits", [None, (8, 4), 4])
def test_every_state_that_comes_about_is_accepted(policy, options, kv_bits):
    model = tiny.make(head_dim=32)
    how = {"policy": policy, "kv_bits": kv_bits, "kv_group_size": 32, **options}
    for length in (1, 2, 11, 12, 13, 14, 30):
        for last in (1, length):
            caches = make_prompt_cache(model, 12, **how)
            sizes = [length - last, last] if length > last else [length]
            tiny.feed(model, tiny.tokens(length), caches, sizes)
            for cache in caches:
                assert accepted(cache)
                if length == 30 and cache.can_trim(3):
                    cache.trim(3)
                    assert accepted(cache)
                cache.trim(0)
    rows = []
    for length in (3, 20):
        rows.append(make_prompt_cache(model, 12, **how))
        tiny.feed(model, tiny.tokens(length), rows[-1], length)
    batch = [a.merge([a, b]) for a, b in zip(*rows, strict=True)]
    tiny.feed(model, tiny.tokens(2, batch=2), batch, 1)
    for cache in batch:
        assert all(accepted(cache.extract(i)) for i in range(2))


def accepted(cache):
    twin = type(cache).from_state(cache.state)
    return (twin.offset, twin.size()) == (cache.offset, cache.size())


def rows_of(generator, heads, length, dim):
    a = generator.normal(size=(1, heads, length, dim)).astype(np.float32)
    return mx.array(a)


def feed_rows(cache, lengths, seed=0):
    """Outputs of one layer that is fed random rows."""
    generator = np.random.default_rng(seed)
    outputs = []
    for n in lengths:
        q = rows_of(generator, 4, n, 64)
        k, v = rows_of(generator, 2, n, 64), rows_of(generator, 2, n, 32)
        check_entries(cache.rule, cache.keys, k, cache.values, v)
        mask = cache.make_mask(n)
        k, v = cache.update_and_fetch(k, v)
        outputs.append(
            dispatcher.dispatch(q, k, v, cache=cache, scale=0.3, mask=mask, sinks=None)
        )
    return np.array(mx.concatenate(outputs, axis=2))


VALUES = [
    *[None, True, False, -1, 0, 1, 3, 4, 8, 12, 13, 22, 64, 4096, 2**31 - 1, 2**31],
    *[2**40, 10**30, 0.5, -0.5, 1e300, float("nan"), float("inf"), "", "tova", "head"],
    *["layer", "once", "full", "window", [], [4, 4], {}, {"policy": "tova"}],
]


def mutated(state, dice):
    """A state with one or two things in it changed."""
    state = dict(zip(NAMES, state, strict=True))
    state["config"] = json.loads(state["config"])
    for _ in range(dice.choice([1, 1, 2])):
        name = dice.choice(NAMES)
        if name == "config":
            below = dice.choice([state["config"], state["config"]["rule"]])
            key = dice.choice([*below, "unknown"])
            below[key] = copy.deepcopy(dice.choice(VALUES))
            if dice.random() < 0.1:
                below.pop(key)
        elif (
            isinstance(state[name], mx.array)
            and dice.random() < 0.8
            and state[name].size
        ):
            state[name] = mutated_array(state[name], dice)
        else:
            state[name] = dice.choice([*VALUES, mx.zeros((1, 1, 13)), *state.values()])
        if not isinstance(state["config"].get("rule"), dict):
            break
    state["config"] = json.dumps(state["config"])
    values = list(state.values())
    if dice.random() < 0.1:
        i, j = dice.randrange(len(values)), dice.randrange(len(values))
        values[i], values[j] = values[j], values[i]
    if dice.random() < 0.05:
        values.pop(dice.randrange(len(values)))
    return tuple(values)


def mutated_array(array, dice):
    kind = dice.randrange(6)
    if kind == 0:
        return array.astype(dice.choice([mx.float16, mx.int32, mx.uint32, mx.float32]))
    if kind == 1:
        axis = dice.randrange(array.ndim)
        return mx.take(array, mx.arange(dice.randrange(array.shape[axis])), axis=axis)
    if kind == 2:
        return mx.concatenate([array, array], axis=dice.randrange(array.ndim))
    if kind == 3:
        return array.swapaxes(0, dice.randrange(array.ndim))
    if kind == 4:
        return array + dice.choice([1, 2, 100])
    changed = np.array(array)
    index = tuple(dice.randrange(n) for n in array.shape)
    whole = np.issubdtype(changed.dtype, np.integer)
    number = dice.choice([0, 1, 5, 12, 21, 22, 10**6])
    if dice.random() < 0.5:
        number = -number if changed.dtype == np.int32 else number
    numbers = [0.0, 1.0, np.nan, np.inf, -1.0]
    changed[index] = number if whole else dice.choice(numbers)
    return mx.array(changed)


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("tova", {}),
        ("tova", {"kv_bits": 8, "kv_group_size": 32, "n_sinks": 2, "n_recent": 3}),
        ("fade", {"granularity": "head"}),
        ("h2o", {}),
        ("streaming", {}),
        ("keydiff", {}),
        ("full", {}),
    ],
)
def test_a_changed_state_is_refused_or_goes_on(policy, options):
    size = None if policy == "full" else 12
    dice = random.Random(f"{policy} {options}")
    states = []
    for lengths in ([5], [22], [20, 1, 1]):
        cache = PolicyKVCache(size, policy, **options)
        feed_rows(cache, lengths)
        states.append(cache.state)
    refused = went_on = 0
    for _ in range(150):
        state = mutated(dice.choice(states), dice)
        try:
            cache = PolicyKVCache.from_state(state)
            seen, limit = cache.offset, cache.max_size
            # Rows of another shape than the model's are refused here.
            output = feed_rows(cache, [1, 1, 2, 1], seed=1)
        except CacheStateError:
            refused += 1
            continue
        went_on += 1
        assert np.isfinite(output).all()
        assert cache.offset == seen + 5
        assert limit is None or cache.size() <= limit
        positions = np.array(cache.positions)
        assert positions.shape[-1] == cache.size()
        assert (np.diff(positions) > 0).all()
        assert positions.min() >= 0
        assert positions.max() < cache.offset
        assert accepted(cache)
    assert refused >= 60
    assert went_on >= 5


@pytest.mark.parametrize("journal", [4097, 10**9])
def test_a_journal_of_thousands_of_tokens_is_refused(journal):
    with pytest.raises(OptionError, match="at most 4096"):
        TOVACache(12, journal=journal)
    TOVACache(12, journal=4096)


def test_values_must_fit_those_held():
    cache = PolicyKVCache(12, "tova")
    feed_rows(cache, [5])
    held, values = cache.keys, cache.values
    new = (mx.zeros((1, 2, 1, 64)), mx.zeros((1, 2, 1, 32)))
    check_entries(cache.rule, held, new[0])
    check_entries(cache.rule, held, new[0], values, new[1])
    for wrong in (mx.zeros((1, 2, 1, 64)), mx.zeros((1, 1, 1, 32))):
        with pytest.raises(CacheStateError, match=r"values .* do not"):
            check_entries(cache.rule, held, new[0], values, wrong)
    with pytest.raises(CacheStateError, match="do not belong"):
        check_entries(cache.rule, None, new[0], None, mx.zeros((1, 2, 2, 32)))


class Holder(nn.Module):
    """A model that is these arrays."""

    def __init__(self, **arrays):
        super().__init__()
        self.update(arrays, strict=False)
        for name, array in arrays.items():
            self[name] = array


# 64 KiB are a row of sums, so these have some, and a rest.
TYPES = [mx.float32, mx.bfloat16, mx.float16, mx.uint32, mx.uint8, mx.bool_]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7, 3), (3, 90_001)])
def test_one_changed_weight_is_another_model(dtype, shape):
    mx.random.seed(0)
    array = mx.random.randint(0, 2, shape).astype(dtype)
    before = fingerprint(Holder(a=array, b=mx.zeros((2,))))
    assert fingerprint(Holder(b=mx.zeros((2,)), a=mx.array(array))) == before
    flat = array.reshape(-1)
    for i in {0, flat.size // 2, flat.size - 1}:
        changed = mx.array(flat)
        changed[i] = 1 - flat[i].item()
        assert fingerprint(Holder(a=changed.reshape(shape), b=mx.zeros((2,)))) != before
    assert fingerprint(Holder(c=array, b=mx.zeros((2,)))) != before
    assert fingerprint(Holder(a=array.reshape(1, *shape), b=mx.zeros((2,)))) != before


def test_the_order_of_numbers_is_part_of_a_fingerprint():
    mx.random.seed(0)
    # 130 rows of sums.
    array = mx.random.normal((1040, 2048))
    before = fingerprint(Holder(a=array))
    for order in ([1, 0], [8, 1, 2, 3, 4, 5, 6, 7, 0]):
        rows = mx.concatenate([mx.array(order), mx.arange(len(order), 1040)])
        assert fingerprint(Holder(a=array[rows])) != before
    assert fingerprint(Holder(a=mx.contiguous(array.T).T)) == before
    wide = mx.concatenate([array, array], axis=1)
    assert fingerprint(Holder(a=wide[:, 2048:])) == before
    assert fingerprint(Holder(a=mx.repeat(array, 2, axis=0)[::2])) == before
    assert fingerprint(Holder(a=-array)) != before


def test_a_fingerprint_copies_nothing():
    array = mx.zeros((64, 1 << 18), mx.bfloat16)
    mx.eval(array)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    fingerprint(Holder(a=array))
    assert mx.get_peak_memory() - before < array.nbytes // 8


def test_a_model_with_numbers_without_dimensions_has_a_fingerprint():
    one, other = zoo.make("apertus"), zoo.make("apertus", seed=1)
    assert fingerprint(one) == fingerprint(one)
    assert fingerprint(one) != fingerprint(other)


def test_a_fine_tune_is_not_its_base(model, tmp_path):
    # Matrices of more than 64 KiB are changed, and nothing else.
    path = tmp_path / "prompt.safetensors"
    base = tiny.make(n_heads=24)
    convert(base, 12)
    caches = base.make_cache()
    tiny.feed(base, tiny.tokens(22), caches, SIZES)
    save_prompt_cache(path, caches, model=base)
    load_prompt_cache(path, model=base)
    base.update(
        tree_map(lambda a: a + 0.01 if a.nbytes > 1 << 16 else a, base.parameters())
    )
    with pytest.raises(CacheStateError, match="another model"):
        load_prompt_cache(path, model=base)


def test_a_quantised_model_has_another_fingerprint_for_every_weight():
    model = tiny.make(n_heads=8, n_kv_heads=4)
    nn.quantize(model, group_size=32, bits=4)
    before = fingerprint(model)
    layer = model.layers[1].mlp.down_proj
    layer.weight[3, 2] = layer.weight[3, 2] ^ 1
    assert fingerprint(model) != before


def test_a_file_with_a_fingerprint_of_an_earlier_version_loads(model, tmp_path):
    path = tmp_path / "prompt.safetensors"
    caches = read(model)
    save_prompt_cache(path, caches, metadata={"tova_mlx_model": "0" * 32})
    user = tiny.make()
    convert(user, 12)
    loaded, _ = load_prompt_cache(path, model=user)
    assert same(go_on(model, loaded), go_on(model, caches))


def test_a_name_is_that_of_a_file(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "talk.safetensors"
    assert prompt_path("~/talk") == prompt_path("~/talk.safetensors") == file
    assert prompt_path("talk.v2") == Path("talk.v2.safetensors")
    caches = read(model)
    assert save_prompt_cache("~/talk", caches) == file
    for name in ("talk", "~/talk", file, "talk.safetensors"):
        loaded, _ = load_prompt_cache(name)
        assert len(loaded) == 3
    # One that has another name.
    file.rename(tmp_path / "renamed")
    loaded, _ = load_prompt_cache("renamed")
    assert len(loaded) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["renamed"]
    # And one that MLX cannot open by itself.
    caf = tmp_path / "caf\udce9.safetensors"
    assert save_prompt_cache(caf, caches) == caf
    loaded, _ = load_prompt_cache(caf)
    assert len(loaded) == 3


@pytest.mark.parametrize(
    "name", ["", ".", "/", "~nobody-of-this-name/a", "a\0b", "x" * 300, "no/where"]
)
def test_a_name_that_cannot_be_is_one_line(model, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CacheStateError):
        save_prompt_cache(name, read(model))
    with pytest.raises(CacheStateError):
        load_prompt_cache(name)
    assert not list(tmp_path.iterdir())


def drop(start):
    """Leave out what begins so."""
    return lambda named: {n: v for n, v in named.items() if not n.startswith(start)}


def renamed(old, new):
    return lambda named: {
        new + n[len(old) :] if n.startswith(old) else n: v for n, v in named.items()
    }


@pytest.mark.parametrize(
    ("arrays", "texts"),
    [
        (dict, lambda _: {}),
        (dict, drop("1.")),
        (dict, drop("1.2")),
        (dict, drop("2.")),
        (dict, drop("2.1.")),
        (dict, renamed("1.", "1.0.")),
        (dict, renamed("2.", "3.")),
        (dict, lambda t: t | {"1.0": "Any"}),
        (dict, lambda t: t | {"1.0": "KVCache"}),
        (dict, lambda t: t | {"1.0": "load_prompt_cache"}),
        (dict, lambda t: t | {"1.0": "nn"}),
        (dict, lambda t: t | {"1.999999999": "KVCache"}),
        (dict, lambda t: t | {"2.1.1": "array"}),
        (lambda a: {}, dict),
        (drop("0."), dict),
        (drop("1."), dict),
        (drop("2."), dict),
        (drop("0.7"), dict),
        (drop("0.2"), dict),
        (renamed("0.", "0.0."), dict),
        (renamed("0.", "layers."), dict),
        (renamed("2.", "999999999."), dict),
        (renamed("0.2", "0.999999999"), dict),
        (lambda a: a | {"0.0.0": mx.zeros((2,))}, dict),
        (lambda a: a | {"3.0": mx.zeros((2,))}, dict),
        (lambda a: {n: v.astype(mx.int32) for n, v in a.items()}, dict),
    ],
)
def test_a_file_that_was_put_together_wrongly_is_refused(
    model, arrays, texts, tmp_path
):
    path = tmp_path / "prompt.safetensors"
    save_prompt_cache(path, read(model, policy="fade"), metadata={"title": "a"})
    named, metadata = mx.load(str(path), return_metadata=True)
    mx.eval(named)
    mx.save_safetensors(str(path), arrays(named), texts(metadata))
    user = tiny.make()
    convert(user, 12, policy="fade")
    with pytest.raises(CacheStateError, match=r"^\S*prompt.safetensors: "):
        load_prompt_cache(path, model=user)


def test_a_save_that_fails_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / "prompt.safetensors"
    save_prompt_cache(path, read(model))
    before = path.read_bytes()

    def half(name, *_):
        with open(name, "wb") as file:
            file.write(b"half")
        raise RuntimeError("no space left")

    monkeypatch.setattr(mx, "save_safetensors", half)
    with pytest.raises(CacheStateError, match="no space left"):
        save_prompt_cache(path, read(model))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(CacheStateError, match="Check the directory"):
        save_prompt_cache(tmp_path / "nowhere" / "a.safetensors", read(model))
    with pytest.raises(CacheStateError, match=r"b\.safetensors: no such file"):
        load_prompt_cache(tmp_path / "b")


@pytest.mark.parametrize("name", ["longcat_flash", "falcon_h1", "gemma3n", "gemma3"])
def test_models_with_caches_of_several_kinds_go_on_the_same(name, tmp_path):
    model, path = zoo.make(name), tmp_path / "prompt.safetensors"
    convert(model, 12)
    caches = model.make_cache()
    tiny.feed(model, tiny.tokens(22), caches, SIZES)
    save_prompt_cache(path, caches, model=model)
    more = tiny.tokens(12, seed=5)
    want = tiny.feed(model, more, caches, [5, 1, 1, 1, 4])
    loaded, _ = load_prompt_cache(path, model=model)
    got = tiny.feed(model, more, loaded, [5, 1, 1, 1, 4])
    assert mx.array_equal(want, got)
    convert(model, 13)
    with pytest.raises(CacheStateError, match=r"max_size=12.*makes.*max_size=13"):
        load_prompt_cache(path, model=model)
