"""Centred and turned keys: what is stored, from what, and wherever keys go."""

import json
from concurrent.futures import ThreadPoolExecutor
from math import sqrt

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models import llama

from tova_mlx import (
    PolicyKVCache,
    TOVACache,
    convert,
    describe,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from tova_mlx.errors import CacheStateError
from tova_mlx.storage.formats import storage_for
from tova_mlx.storage.hadamard import Center, can_turn, turn, turn_back

LIMIT = 12


@pytest.fixture
def model():
    return tiny.make(n_heads=4, n_kv_heads=2, head_dim=32)


def sylvester(n):
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / sqrt(n)


def told(entries, bits, group, center):
    """Keys as few bits have them, in NumPy: centred, turned, rounded, and back."""
    h = sylvester(entries.shape[-1])
    turned = ((entries - center) @ h).astype(np.float16).astype(np.float64)
    groups = turned.reshape(*turned.shape[:-1], -1, group)
    low = groups.min(axis=-1, keepdims=True)
    step = (groups.max(axis=-1, keepdims=True) - low) / (2**bits - 1)
    levels = np.round((groups - low) / step) * step + low
    return levels.reshape(turned.shape) @ h + center, step.max()


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_keys_come_back_as_near_as_numpy_has_them(bits, group):
    rng = np.random.default_rng(bits + group)
    # What all share is far larger than what tells them apart, as in Qwen2.5.
    keys = rng.normal(size=(1, 2, 50, 64)) + 100 * rng.normal(size=(1, 2, 1, 64))
    form = storage_for((f"{bits}h", 4), group).keys.fitted(mx.array(keys, mx.float32))
    stored = form.quantize(mx.array(keys, mx.float32))
    got = np.array(stored.dequantized()).astype(np.float64)
    center = np.array(form.center.array)
    np.testing.assert_allclose(center, keys[:, :, 1:].mean(2, keepdims=True), rtol=1e-3)
    want, step = told(keys, bits, group, center)
    # MLX takes other levels for the same range, no coarser ones.
    assert np.abs(got - keys).std() < 1.15 * np.abs(want - keys).std()
    assert np.abs(got - keys).max() < 8 * step
    plain, _ = storage_for((bits, 4), group).store(*[mx.array(keys, mx.float32)] * 2)
    worse = np.array(plain.dequantized()) - keys
    assert np.abs(worse).std() > 10 * np.abs(got - keys).std()


@pytest.mark.parametrize("width", [32, 64, 96, 128, 192])
@pytest.mark.parametrize("fitted", [False, True])
def test_products_are_those_of_what_is_stored(width, fitted):
    mx.random.seed(width)
    keys = mx.random.normal((2, 3, 300, width)) + 3
    form = storage_for(("6h", 4), 32).keys
    stored = (form.fitted(keys[:1]) if fitted else form).quantize(keys)
    back = np.array(stored.dequantized()).astype(np.float64)
    for n in (1, 40):
        left = mx.random.normal((2, 3, n, width))
        want = np.array(left) @ back.swapaxes(2, 3)
        np.testing.assert_allclose(
            np.array(stored.product(left, True)), want, atol=2e-3
        )
        left = mx.random.normal((2, 3, n, 300))
        want = np.array(left) @ back
        got = np.array(stored.product(left, False))
        np.testing.assert_allclose(got, want, atol=5e-3)


@pytest.mark.parametrize(
    "width", [1, 2, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 256]
)
def test_a_turn_keeps_products_and_can_be_undone(width):
    a, b = mx.random.normal((2, 3, 5, width))
    assert can_turn(width)
    np.testing.assert_allclose(np.array(turn_back(turn(a))), np.array(a), atol=1e-5)
    got = np.array(turn(a) @ turn(b).swapaxes(1, 2))
    np.testing.assert_allclose(got, np.array(a @ b.swapaxes(1, 2)), atol=1e-4)


@pytest.mark.parametrize("width", [3, 6, 10, 33, 36, 44, 52, 72, 100, 288, 576])
def test_widths_that_mlx_cannot_turn_stay_as_they_are(width):
    assert not can_turn(width)
    a = mx.random.normal((3, width))
    assert turn(a) is a
    assert turn_back(a) is a


def centers(caches):
    return [c.options.storage.keys.center for c in caches]


def test_the_center_is_the_models_own_mean_key_taken_once(model, monkeypatch):
    calls = []
    call = type(model).__call__
    monkeypatch.setattr(
        type(model),
        "__call__",
        lambda self, x, *a, **k: calls.append(x) or call(self, x, *a, **k),
    )
    caches = make_prompt_cache(model, LIMIT, kv_bits=4, kv_group_size=32)
    (tokens,) = [x for x in calls if x.shape[1] > 1]
    assert tokens.shape == (1, 512)
    assert len(set(tokens[0].tolist())) > 0.9 * tiny.VOCABULARY
    own = mlx_lm_cache.make_prompt_cache(model)
    model(tokens, cache=own)
    for center, cache in zip(centers(caches), own, strict=True):
        mean = np.array(cache.state[0])[:, :, 1:].mean(axis=2, keepdims=True)
        np.testing.assert_allclose(np.array(center.array), mean, rtol=2e-3, atol=1e-4)
    assert len(set(centers(caches))) == len(caches)
    again = make_prompt_cache(model, 2 * LIMIT, kv_bits=4, kv_group_size=32)
    convert(model, LIMIT, policy="fade", kv_bits=4, kv_group_size=32)
    assert centers(again) == centers(model.make_cache()) == centers(caches)
    assert len([x for x in calls if x.shape[1] > 1]) == 2
    # Another model of the same weights has the same ones.
    twin = tiny.make(n_heads=4, n_kv_heads=2, head_dim=32)
    other = make_prompt_cache(twin, LIMIT, kv_bits=4, kv_group_size=32)
    assert centers(other) == centers(caches)


def test_a_cache_made_in_one_thread_serves_another(model):
    mx.eval(model.parameters())
    how = {"kv_bits": 4, "kv_group_size": 32}
    with ThreadPoolExecutor(1) as pool:
        caches = pool.submit(make_prompt_cache, model, LIMIT, **how).result()
    # MLX's threads cannot evaluate what another has begun.
    logits = tiny.feed(model, tiny.tokens(20), caches, 10)
    here = make_prompt_cache(model, LIMIT, **how)
    assert mx.array_equal(logits, tiny.feed(model, tiny.tokens(20), here, 10))


def test_plain_bits_need_no_model(model):
    caches = make_prompt_cache(model, LIMIT, kv_bits=(4, 4), kv_group_size=32)
    assert "center" not in repr(caches[0].options.storage)
    # Without a model keys are turned, not centred.
    assert centers([TOVACache(LIMIT, kv_bits=4)]) == [None]


@pytest.mark.parametrize("policy", ["tova", "fade", "streaming"])
def test_a_center_is_saved_with_its_keys(model, policy, tmp_path):
    how = {"policy": policy, "kv_bits": 4, "kv_group_size": 32}
    convert(model, LIMIT, **how)
    for n in (0, 30):
        caches = model.make_cache()
        if n:
            tiny.feed(model, tiny.tokens(n), caches, n)
            path = tmp_path / "prompt.safetensors"
            save_prompt_cache(path, caches, model=model)
            copies = [load_prompt_cache(path, model=model)[0]]
        else:
            copies = []
        copies.append([type(c).from_state(c.state) for c in caches])
        more = tiny.tokens(20, seed=3)
        want = tiny.feed(model, more, caches, [9, 1, 10])
        for loaded in copies:
            assert centers(loaded) == centers(caches)
            assert mx.array_equal(tiny.feed(model, more, loaded, [9, 1, 10]), want)


def test_rows_around_different_centers_are_no_batch(model):
    other = tiny.make(seed=3, n_heads=4, n_kv_heads=2, head_dim=32)
    a, b = (
        make_prompt_cache(m, LIMIT, kv_bits=8, kv_group_size=32)[0]
        for m in (model, other)
    )
    with pytest.raises(CacheStateError, match="different options"):
        a.merge([a, b])
    assert len(a.merge([a, a]).options.storage.keys.constant) > 64


def test_what_is_quantised_on_the_way_is_centred_on_what_is_held(model):
    caches = make_prompt_cache(model, LIMIT)
    tiny.feed(model, tiny.tokens(30), caches, 30)
    for cache in caches:
        keys = np.array(cache.slots.held_entries()[0])
        center = cache.to_quantized(32, 4).options.storage.keys.center
        mean = keys[:, :, 1:].mean(axis=2, keepdims=True)
        np.testing.assert_allclose(np.array(center.array), mean, rtol=2e-3, atol=1e-4)
    empty = PolicyKVCache(LIMIT).to_quantized(32, 4)
    assert centers([empty]) == [None]


@pytest.mark.parametrize(
    "constant",
    [
        "2",
        "6:2:!",
        "6:2:AAA",
        "6:3:AAAAAAAA",
        "6:x:AAAA",
        "6:" + Center(np.full((2, 32), np.inf)).text,
        "6:" + Center(np.zeros((2, 16))).text,
        "6:" + Center(np.zeros((1, 32))).text,
        "8:" + Center(np.zeros((2, 32))).text,
        "5:" + Center(np.zeros((2, 32))).text,
        Center(np.zeros((2, 32))).text,
        5,
        ["2"],
    ],
)
def test_a_state_with_no_center_of_its_keys_is_refused(model, constant):
    cache = make_prompt_cache(model, LIMIT, kv_bits=4, kv_group_size=32)[0]
    tiny.feed(model, tiny.tokens(5), [cache, *make_prompt_cache(model, LIMIT)[1:]], 5)
    *state, text = cache.state
    config = json.loads(text)
    assert config["storage"][:3] == ["6h", 4, 32]
    config["storage"][3] = constant
    with pytest.raises(CacheStateError):
        type(cache).from_state((*state, json.dumps(config)))
    config["storage"][:2], config["storage"][3] = [6, 4], Center(np.zeros((2, 32))).text
    with pytest.raises(CacheStateError, match="6 bits have no constant"):
        type(cache).from_state((*state, json.dumps(config)))


def test_a_cache_of_before_loads_and_goes_on(model):
    """Plain bits, scales in the model's own type, and no constants in its JSON."""
    caches = make_prompt_cache(model, LIMIT, kv_bits=(8, 4), kv_group_size=32)
    tiny.feed(model, tiny.tokens(30), caches, 30)
    old = []
    for cache in caches:
        keys, values, *others, text = cache.state
        assert json.loads(text)["storage"] == [8, 4, 32]
        codes = [
            (a, *(s.astype(mx.float32) for s in some)) for a, *some in (keys, values)
        ]
        old.append(type(cache).from_state((*codes, *others, text)))
    more = tiny.tokens(20, seed=3)
    want = tiny.feed(model, more, caches, [9, 1, 10])
    got = tiny.feed(model, more, old, [9, 1, 10])
    np.testing.assert_allclose(np.array(got), np.array(want), atol=1e-5)
    # And joins a batch with one made now.
    batch = [a.merge([a, b]) for a, b in zip(old, caches, strict=True)]
    tiny.feed(model, tiny.tokens(3, batch=2), batch, 1)


def test_a_layer_far_noisier_than_the_others_gets_more_bits():
    """As the first of Qwen2.5's: its queries and keys are large."""
    mx.random.seed(7)
    how = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 12,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,
        "vocab_size": tiny.VOCABULARY,
    }
    model = llama.Model(llama.ModelArgs.from_dict(how))

    def widths(bits):
        caches = make_prompt_cache(model, LIMIT, kv_bits=bits, kv_group_size=32)
        assert {c.options.storage.keys.choice for c in caches} == {f"{bits[0]}"}
        return [c.options.storage.keys.affine.bits for c in caches], caches

    assert widths(("6h", 4))[0] == [6] * 12
    for i in (2, 7, 9):
        layer = model.layers[i].self_attn
        layer.q_proj.weight = layer.q_proj.weight * (4 + i)
        layer.k_proj.weight = layer.k_proj.weight * 3
    twin = llama.Model(llama.ModelArgs.from_dict(how))
    twin.update(model.parameters())
    model = twin
    # One of ten, and the noisiest.
    got, caches = widths(("6h", 4))
    assert got == [6] * 9 + [8] + [6] * 2
    assert widths(("4h", 4))[0] == [4] * 9 + [8] + [4] * 2
    assert widths(("8h", 8))[0] == [8] * 12
    tiny.feed(model, tiny.tokens(30), caches, 30)
    wide, narrow = caches[9], caches[8]
    # Codes of 32 numbers by two bits each, for two heads and 29 slots.
    assert wide.nbytes - narrow.nbytes == 2 * 32 * 2 // 8 * (LIMIT + 1 + 16)
    assert describe(caches).totals["bytes_now"] == sum(c.nbytes for c in caches)
    again = type(wide).from_state(wide.state)
    assert again.options.storage == wide.options.storage
    more = make_prompt_cache(model, "60kB", kv_bits=("6h", 4), kv_group_size=32)
    tiny.feed(model, tiny.tokens(300), more, 100)
    assert 54_000 < sum(c.nbytes for c in more) <= 60_000
