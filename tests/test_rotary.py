"""Rotary positions that are renumbered: against models, and against arithmetic.

What happens in any order of reading, taking back, saving and batching is in the state
machines, which renumber too.
"""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
import zoo
from mlx_lm.models import rope_utils
from test_coverage import FAMILIES

from tova_mlx import (
    PolicyKVCache,
    convert,
    describe,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from tova_mlx.errors import (
    CacheStateError,
    OptionError,
    TovaError,
    UnsupportedModelError,
)
from tova_mlx.hooks.layers import leaves
from tova_mlx.hooks.trimming import trim_prompt_cache
from tova_mlx.models import rotary
from tova_mlx.models.conversion import pin_in_new_caches, pin_tokens
from tova_mlx.models.rotary import said_of, trained_range
from tova_mlx.storage.formats import storage_for
from tova_mlx.storage.rotation import PERIOD, Renumbering, RotatedEntries, Rotation

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.3}
LONG = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 16,
    "long_factor": [1.0 + i for i in range(16)],
}
KINDS = {
    "plain": nn.RoPE(32),
    "traditional": nn.RoPE(32, traditional=True),
    "partial": nn.RoPE(16, base=500.0),
    "linear": nn.RoPE(32, scale=0.25),
    "llama3": rope_utils.initialize_rope(32, 10000.0, False, LLAMA3, 512),
    "yarn": rope_utils.initialize_rope(32, 10000.0, True, YARN, 512),
    "longrope": rope_utils.initialize_rope(32, 10000.0, False, LONG, 512),
    "proportional": rope_utils.ProportionalRoPE(32, 16),
}


def rotation_of(module):
    """What MLX is asked for when a module rotates."""
    calls = []
    with rotary._watched(calls.append):
        module(mx.zeros((1, 1, 1, 32)), offset=3)
    return calls[0]


def at(*positions):
    return mx.array(positions, mx.int32).reshape(1, 1, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_rotated_on_is_one_that_the_model_rotates_there(kind):
    module, rng = KINDS[kind], np.random.default_rng(0)
    keys = mx.random.normal((1, 2, 64, 32), key=mx.random.key(0))
    start, stop = (mx.array(rng.integers(0, 4096, (1, 1, 64))) for _ in range(2))

    def given(positions):
        parts = [
            module(keys[:, :, i : i + 1], offset=int(positions[0, 0, i]))
            for i in range(64)
        ]
        return mx.concatenate(parts, axis=2)

    got = rotation_of(module).rotated(given(start), start, stop)
    assert mx.abs(got - given(stop)).max() <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_bits", [None, 4, (8, 8)])
def test_a_thousand_renumberings_do_not_add_up(kind, kv_bits):
    rotation, rng = rotation_of(KINDS[kind]), np.random.default_rng(1)
    when = Renumbering(0, 1, rotation)
    cache = PolicyKVCache(
        32, "window", kv_bits=kv_bits, kv_group_size=32, renumbering=when
    )
    keys = mx.random.normal((1, 2, 33, 32), key=mx.random.key(0))
    for i in range(33):
        own = keys[:, :, i : i + 1]
        own = rotation.rotated(own, at(0), at(cache.offset))
        stored = cache.update_and_fetch(own, own)
        cache.attend(own, *stored, scale=1.0)
    slots = cache.slots
    rotary_before = slots.rotary
    first = mx.array(slots.keys_to_read.dequantized() if kv_bits else slots.keys)
    given = keys[:, :, slots.positions.flatten()]
    apart = first - rotation.rotated(given, at(*[0] * 33), rotary_before)
    most = {None: 1e-5, 4: 0.15, (8, 8): 0.02}[kv_bits]
    assert mx.square(apart).sum() <= most**2 * mx.square(given).sum()
    for _ in range(1000):
        slots.rotate(mx.array(rng.integers(0, 600, (1, 1, 33)), mx.int32))
    now = slots.keys_to_read.dequantized() if kv_bits else slots.keys
    want = rotation.rotated(first, rotary_before, slots.rotary)
    assert mx.abs(now - want).max() <= 1e-4


def streaming_llm(q, k, v, max_size, n_sinks, period, base, scale):
    """StreamingLLM with positions in the cache: one token after another, float64.

    Kept keys are as the projection gave them, and are rotated by their place in the
    cache, which is told anew every `period` tokens.
    """
    half = q.shape[1] // 2
    frequencies = base ** (-np.arange(half) / half)

    def rotated(vector, place):
        z = (vector[:half] + 1j * vector[half:]) * np.exp(1j * place * frequencies)
        return np.concatenate([z.real, z.imag])

    cache, outputs, place = [], [], 0
    for t in range(len(q)):
        cache.append((t, place))
        asked = rotated(q[t], place)
        place += 1
        logits = np.array([rotated(k[i], p) @ asked * scale for i, p in cache])
        weights = np.exp(logits - logits.max())
        outputs.append(weights / weights.sum() @ v[[i for i, _ in cache]])
        if len(cache) > max_size:
            del cache[n_sinks]
            if (t + 1) % period == 0:
                cache = [(i, p) for p, (i, _) in enumerate(cache)]
                place = len(cache)
    return np.array(outputs), [i for i, _ in cache]


@pytest.mark.parametrize("period", [1, 5, 64])
@pytest.mark.parametrize("chunk", [1, 7, 90])
def test_streaming_is_that_of_its_paper(period, chunk):
    rng = np.random.default_rng(2)
    q, k, v = (rng.normal(size=(90, 16)) for _ in range(3))
    want, held = streaming_llm(q, k, v, 20, 4, period, 100.0, 0.5)
    rotation = Rotation(16, False, 100.0, 1.0)
    cache = PolicyKVCache(20, "streaming", renumbering=Renumbering(0, period, rotation))
    outputs = []
    for i in range(0, 90, chunk):
        n = min(chunk, 90 - i)
        own = [mx.array(a[i : i + n], mx.float32)[None, None] for a in (q, k, v)]
        own[:2] = (nn.RoPE(16, base=100.0)(a, offset=cache.offset) for a in own[:2])
        mask = cache.make_mask(n)
        stored = cache.update_and_fetch(*own[1:])
        outputs.append(cache.attend(own[0], *stored, scale=0.5, mask=mask))
        assert cache.offset <= 20 + max(period, n)
    got = np.array(mx.concatenate(outputs, axis=2))[0, 0]
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert cache.positions.tolist() == [[held]]


@pytest.fixture
def often(monkeypatch):
    """Renumbered every 8 tokens."""
    monkeypatch.setattr(rotary, "PERIOD", 8)
    monkeypatch.setattr(Renumbering.__init__, "__defaults__", (0, 8, None))


REFUSED_ANYWAY = "where window cannot be right, or would be what the model has already"
# Of those that window takes, the ones that cannot be renumbered, and why.
REFUSED = {
    "bailing_hybrid": "other keys than it stores",
    "bailing_moe_linear": "more than keys",
    "bailing_moe_v3": "other keys than it stores",
    "deepseek_v2": "more with its keys",
    "deepseek_v3": "other keys than it stores",
    "gemma2": "computes its own attention",
    "gemma3n": "more with its keys",
    "gemma4_text": "keys of others",
    "glm4_moe_lite": "other keys than it stores",
    "gpt2": "more than keys",
    "gpt_bigcode": "more than keys",
    "hunyuan": "more with its keys",
    "hunyuan_v1_dense": "more with its keys",
    "kimi_k25": "other keys than it stores",
    "kimi_k3": "other keys than it stores",
    "kimi_linear": "other keys than it stores",
    "kimi_vl": "other keys than it stores",
    "longcat_flash": "other keys than it stores",
    "longcat_flash_ngram": "other keys than it stores",
    "minicpm3": "more with its keys",
    "mistral4": "other keys than it stores",
    "plamo": "other keys than it stores",
    "plamo2": "computes its own attention",
    "youtu_llm": "more with its keys",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_window_is_the_same_wherever_positions_begin(name, often):
    """Nothing but the first tokens leaves it, so all others stay as far apart."""
    if name in zoo.BROKEN:
        pytest.skip(zoo.BROKEN[name])
    model = zoo.make(name)
    tokens = mx.random.randint(0, 100, (1, 44), key=mx.random.key(1))

    def logits(positions, chunk):
        how = {"policy": "window", "positions": positions}
        caches = make_prompt_cache(model, 20, **how)
        got = tiny.feed(model, tokens, caches, chunk)
        ours = [c for c in leaves(caches) if isinstance(c, PolicyKVCache)]
        if positions == "compact":
            used = [c for c in ours if c.seen]
            assert all(c.offset <= 28 for c in used)
            assert all(c.options.renumbering.period == 8 for c in used)
        return np.array(got.astype(mx.float32))

    try:
        want = logits("original", 44)
    except TovaError:
        pytest.skip(REFUSED_ANYWAY)
    if name in REFUSED:
        with pytest.raises(UnsupportedModelError, match=f"{REFUSED[name]}.* Use "):
            logits("compact", 44)
        return
    for chunk in (44, 5):
        np.testing.assert_allclose(logits("compact", chunk), want, atol=2e-3)


def test_most_models_can_be_renumbered():
    fine = []
    for name in FAMILIES:
        if name in zoo.BROKEN:
            continue
        model = zoo.make(name)
        try:
            make_prompt_cache(model, 20, policy="window", positions="compact")
        except TovaError:
            continue
        fine.append(name)
    page = (Path(__file__).parents[1] / "docs/models.md").read_text(encoding="utf-8")
    positions = page.split("## Positions")[1]
    assert f"in {len(fine)} of the\n" in positions
    assert sorted(re.findall(r"`([\w-]+)`[,| ]", positions.split("|---|---|")[1])) == (
        sorted(REFUSED)
    )


def test_each_layer_has_its_own_rotation():
    model = tiny.make(head_dim=32)
    modules = [KINDS["yarn"], lambda a, offset: a, KINDS["partial"]]
    for layer, module in zip(model.model.layers, modules, strict=True):
        layer.self_attn.rope = module
    caches = make_prompt_cache(model, 20, positions="compact")
    found = [c.options.renumbering.rotation for c in caches]
    assert found == [rotation_of(modules[0]), None, rotation_of(modules[2])]


def test_layers_that_the_model_bounds_itself_stay_as_they_are(often):
    model = zoo.make("gemma3_text")
    caches = make_prompt_cache(model, 20, positions="compact")
    tiny.feed(model, tiny.tokens(60), caches, 60)
    ours = [isinstance(c, PolicyKVCache) for c in caches]
    assert {True, False} == set(ours)
    assert all((c.offset == 60) != mine for c, mine in zip(caches, ours, strict=True))


@pytest.mark.parametrize("policy", ["tova", "fade", "streaming", "keydiff"])
@pytest.mark.parametrize("kv_bits", [None, (8, 8), "8h"])
def test_chunks_of_any_size_see_the_same(policy, kv_bits, often):
    model = tiny.make(n_heads=4, n_kv_heads=2, head_dim=32)
    if kv_bits is not None:
        # Codes that rounding flips in a layer would move all that come after it.
        model.model.layers = model.model.layers[:1]
    kv_bits = (kv_bits, 8) if kv_bits == "8h" else kv_bits
    tokens = tiny.tokens(80)
    found = []
    for chunk in (1, 7, 80):
        caches = make_prompt_cache(
            model,
            12,
            policy=policy,
            positions="compact",
            kv_bits=kv_bits,
            kv_group_size=32,
        )
        found.append((tiny.feed(model, tokens, caches, chunk), caches))
    for got, caches in found[1:]:
        apart = mx.abs(got - found[0][0]).max()
        assert apart <= (1e-3 if kv_bits is None else 2e-2)
        for one, other in zip(caches, found[0][1], strict=True):
            assert mx.array_equal(one.positions, other.positions)
            assert one.offset == other.offset <= 12 + 8


@pytest.mark.parametrize(
    ("policy", "limit"), [("streaming", 6), ("fade", 6), ("tova", 10)]
)
@pytest.mark.parametrize("sizes", [[29], [12] + [1] * 17], ids=len)
def test_tokens_taken_back_take_back_what_they_renumbered(policy, limit, sizes, often):
    model, rest = tiny.make(), tiny.tokens(12, seed=9)
    options = {"policy": policy, "positions": "compact"}

    def read(n, sizes):
        caches = make_prompt_cache(model, limit, **options)
        if n:
            tiny.feed(model, tiny.tokens(29)[:, :n], caches, sizes)
        return caches

    caches = read(29, sizes)
    # Within a period, over a renumbering, over two, and all.
    for n in (1, 13, 16, 29):
        twins, fresh = copy.deepcopy(caches), read(29 - n, [29])
        assert trim_prompt_cache(twins, n) == n
        for a, b in zip(twins, fresh, strict=True):
            assert (a.seen, a.offset, a.size()) == (b.seen, b.offset, b.size())
        # And again, to where other tokens were renumbered the first time.
        for _ in range(2):
            got, want = (tiny.feed(model, rest, c, [1, 1, 10]) for c in (twins, fresh))
            assert mx.abs(got - want).max() < 1e-3
            for a, b in zip(twins, fresh, strict=True):
                assert (a.offset, a.size()) == (b.offset, b.size())
                assert mx.array_equal(a.positions, b.positions)
            assert [trim_prompt_cache(c, 11) for c in (twins, fresh)] == [11, 11]


def test_a_renumbering_from_before_a_file_is_not_taken_back(often):
    # The last victim is in its slot, so one token could be, but for its position.
    cache = make_prompt_cache(tiny.make(), 6, positions="compact")[0]
    for seen, can in ((15, True), (16, False), (17, True)):
        feed_layer(cache, seen - cache.seen)
        loaded = type(cache).from_state(cache.state)
        assert cache.can_trim(1)
        assert loaded.can_trim(1) == can
        assert not loaded.can_trim(2)


def feed_layer(cache, n):
    """Random tokens one by one, rotated for nothing."""
    for _ in range(n):
        queries = mx.random.normal((1, 6, 1, 8))
        rows = mx.random.normal((1, 2, 1, 8))
        stored = cache.update_and_fetch(rows, rows)
        mx.eval(cache.attend(queries, *stored, scale=0.3, mask=None))


@pytest.mark.parametrize("journal", [0, 5, 20])
@pytest.mark.parametrize("policy", ["tova", "fade", "streaming"])
def test_bytes_of_renumbered_slots_stay_below_what_is_said(policy, journal):
    when = Renumbering(0, 8)
    cache = PolicyKVCache(12, policy, journal=journal, renumbering=when)
    sizes = []
    for _ in range(60):
        feed_layer(cache, 1)
        sizes.append(cache.nbytes)
        assert cache.nbytes <= cache.max_nbytes
    assert max(sizes) > 0.8 * cache.max_nbytes


@pytest.mark.parametrize("start", [0, 1, 7, 8, 9, 16, 40])
def test_a_renumbering_is_due_when_it_was_said_to_be_next(start):
    when, offset, due = Renumbering(start, 8), 0, []
    while (offset := when.next_after(offset)) < 100:
        due.append(offset)
    assert due == [n for n in range(1, 100) if when.is_due(n)]
    assert due[0] == max(8, -(-start // 8) * 8)


def test_auto_is_original_to_the_last_bit_until_the_range_ends(often):
    model = tiny.make()
    model.args.max_position_embeddings = 40
    tokens = tiny.tokens(90)
    caches = {p: make_prompt_cache(model, 12, positions=p) for p in rotary.POSITIONS}
    got = {
        p: tiny.feed(model, tokens, c, [39, 1, *[1] * 10, 40])
        for p, c in caches.items()
    }
    assert mx.array_equal(got["auto"][:, :40], got["original"][:, :40])
    assert not mx.array_equal(got["auto"][:, 41:], got["original"][:, 41:])
    assert not mx.array_equal(got["compact"][:, 17:40], got["original"][:, 17:40])
    assert [c[0].offset for c in caches.values()] == [90, 14, 14]
    assert [c[0].seen for c in caches.values()] == [90, 90, 90]


@pytest.mark.parametrize(
    ("config", "range_"),
    [
        ({"max_position_embeddings": 8192}, 8192),
        ({"max_position_embeddings": 131072, "rope_scaling": LLAMA3}, 131072),
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 2048,
                "rope_scaling": {"type": "linear", "factor": 4.0},
            },
            8192,
        ),
        ({"text_config": {"max_position_embeddings": 4096}}, 4096),
        ({"vocab_size": 3}, None),
    ],
)
def test_the_range_that_a_model_was_trained_for(config, range_):
    model = nn.Module()
    model.args = config
    assert trained_range(model) == range_


def test_where_positions_cannot_be_auto_it_is_said():
    model, said = tiny.make(), []
    for trained, limit in ((None, 12), (100, 12), (8192, 12), (8192, None)):
        model.args.max_position_embeddings = trained
        policy = "tova" if limit else "full"
        caches = make_prompt_cache(model, limit, policy=policy, positions="auto")
        said.append(said_of(model, "auto", caches))
    assert said == [
        "original: the model does not say for how many it was trained",
        "original: within 100 there is no room for 12 tokens",
        "original up to 8,192, then compact",
        "original: nothing is evicted",
    ]


def test_options_that_cannot_work_are_refused():
    model = tiny.make()
    with pytest.raises(OptionError, match="'newest' is not known"):
        make_prompt_cache(model, 12, positions="newest")
    with pytest.raises(OptionError, match="positions='original'"):
        make_prompt_cache(model, 12, positions="compact", prefill="once")
    model.args.max_position_embeddings = 8192
    caches = make_prompt_cache(model, 12, positions="auto", prefill="once")
    assert caches[0].options.renumbering is None


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_a_file_goes_on_as_the_cache_would(kv_bits, often, tmp_path):
    model = tiny.make(n_heads=4, n_kv_heads=2, head_dim=32)
    how = {"kv_bits": kv_bits, "kv_group_size": 32}
    convert(model, 12, positions="compact", **how)
    caches = model.make_cache()
    tiny.feed(model, tiny.tokens(50), caches, [30, *[1] * 20])
    save_prompt_cache(tmp_path / "a.safetensors", caches, model=model)
    loaded, _ = load_prompt_cache(tmp_path / "a.safetensors", model=model)
    more = tiny.tokens(30, seed=5)
    want = tiny.feed(model, more, caches, [1, 1, 20, 1, 7])
    assert mx.array_equal(tiny.feed(model, more, loaded, [1, 1, 20, 1, 7]), want)
    convert(model, 12, **how)
    with pytest.raises(CacheStateError, match="options it was saved with"):
        load_prompt_cache(tmp_path / "a.safetensors", model=model)


def test_a_file_of_a_model_that_rotates_otherwise_is_refused(tmp_path):
    model = tiny.make()
    convert(model, 12, positions="compact")
    caches = model.make_cache()
    tiny.feed(model, tiny.tokens(50), caches, 50)
    save_prompt_cache(tmp_path / "a.safetensors", caches)
    other = tiny.make()
    for layer in other.model.layers:
        layer.self_attn.rope.base = 77.0
    convert(other, 12, positions="compact")
    with pytest.raises(CacheStateError, match="rotates otherwise"):
        load_prompt_cache(tmp_path / "a.safetensors", model=other)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(shift=-1),
        lambda c: c.update(shift=10**6),
        lambda c: c.update(shift=1.5),
        lambda c: c.update(shift=c["shift"] - 1),
        lambda c: c.update(renumbering=None),
        lambda c: c.update(renumbering=[0, 0, None]),
        lambda c: c.update(renumbering=[0, 8, [7, False, 1.0, 1.0, None]]),
        lambda c: c.update(renumbering=[0, 8, [8, False, None, 1.0, [1.0]]]),
        lambda c: c.update(pinned=99),
        lambda c: c.update(pinned="1"),
    ],
)
def test_a_state_that_no_renumbering_gives_is_refused(change, often):
    model = tiny.make()
    caches = make_prompt_cache(model, 12, positions="compact")
    tiny.feed(model, tiny.tokens(50), caches, 50)
    *arrays, text = caches[0].state
    config = json.loads(text)
    change(config)
    with pytest.raises(CacheStateError, match="not the state of a tova_mlx cache"):
        PolicyKVCache.from_state((*arrays, json.dumps(config)))


def test_rotary_positions_of_a_file_are_checked(often):
    model = tiny.make()
    caches = make_prompt_cache(model, 12, positions="compact")
    tiny.feed(model, tiny.tokens(50), caches, 50)
    state = list(caches[0].state)
    assert state[5].dtype == mx.int32
    for wrong in (state[5] + 1, -state[5], state[5][..., ::-1], state[5] * 0):
        with pytest.raises(CacheStateError, match="rotary positions"):
            PolicyKVCache.from_state((*state[:5], wrong, *state[6:]))


def test_bytes_are_as_described(often):
    model = tiny.make(n_heads=4, n_kv_heads=2, head_dim=32)
    for kv_bits in (None, 8):
        how = {"kv_bits": kv_bits, "kv_group_size": 32, "journal": 0}
        caches = make_prompt_cache(model, 32, positions="compact", **how)
        tiny.feed(model, tiny.tokens(90), caches, [60, *[1] * 30])
        totals = describe(caches).totals
        assert totals["bytes_now"] == totals["bytes_at_most"]
        plain = make_prompt_cache(model, 32, **how)
        tiny.feed(model, tiny.tokens(90), plain, [60, *[1] * 30])
        per_slot = 4 if kv_bits is None else 8
        more = totals["bytes_now"] - describe(plain).totals["bytes_now"]
        assert more == 3 * 33 * per_slot


def test_quantised_keys_are_stored_once():
    keys = mx.random.normal((1, 2, 9, 32), key=mx.random.key(3))
    form = storage_for(("6h", 4), 32).keys
    stored = form.quantize(keys)
    rotation = Rotation(32, False, 10000.0, 1.0)
    was, now = at(*range(9))[..., None], at(*range(50, 59))[..., None]
    entries = RotatedEntries(stored, was, now, rotation)
    want = rotation.rotated(stored.dequantized(), was[..., 0], now[..., 0])
    assert mx.array_equal(entries.dequantized(), want)
    queries = mx.random.normal((1, 2, 3, 32), key=mx.random.key(4))
    np.testing.assert_allclose(
        entries.product(queries, True), queries @ want.swapaxes(2, 3), atol=1e-5
    )


@pytest.mark.parametrize("chunk", [1, 50])
def test_a_policy_with_a_score_of_its_own_ranks_quantised_keys_as_they_are_read(chunk):
    rotation = Rotation(32, False, 10000.0, 1.0)
    mx.random.seed(5)
    shared = mx.random.normal((1, 1, 1, 32))
    tokens = [shared + mx.random.normal((1, 1, 1, 32)) for _ in range(300)]
    held = {}
    for kv_bits in (None, (8, 8)):
        when = Renumbering(0, 16, rotation)
        how = {"kv_bits": kv_bits, "kv_group_size": 32, "renumbering": when}
        cache = PolicyKVCache(24, "keydiff", **how)
        for start in range(0, 300, chunk):
            some = tokens[start : start + chunk]
            rotated = [
                mx.fast.rope(
                    key, 32, traditional=False, base=10000.0, scale=1.0, offset=o
                )
                for o, key in enumerate(some, cache.offset)
            ]
            keys = mx.concatenate(rotated, axis=2)
            mask = cache.make_mask(len(some))
            given = cache.update_and_fetch(keys, keys)
            cache.attend(keys, *given, scale=0.1, mask=mask)
        held[kv_bits] = set(cache.positions.flatten().tolist())
    assert len(held[None] & held[8, 8]) >= 21


def test_looking_at_a_model_leaves_mlx_as_it_was():
    before = mx.fast.rope
    make_prompt_cache(tiny.make(), 12, positions="compact")
    assert mx.fast.rope is before


# First tokens that are pinned


@pytest.mark.parametrize(
    "policy", ["window", "streaming", "h2o", "tova", "vatp", "fade", "keydiff"]
)
@pytest.mark.parametrize("chunk", [1, 60])
def test_pinned_tokens_are_held_under_every_policy(policy, chunk):
    model = tiny.make()
    caches = make_prompt_cache(model, 16, policy=policy)
    assert pin_tokens(caches, 6) == 6
    tiny.feed(model, tiny.tokens(60), caches, chunk)
    for cache in caches:
        held = np.array(cache.positions)
        assert (held[..., :6] == np.arange(6)).all()
        assert held.shape[2] == 16


def test_at_most_half_is_pinned():
    caches = make_prompt_cache(tiny.make(), 13, policy="h2o")
    assert pin_tokens(caches, 100) == 6
    assert pin_tokens(make_prompt_cache(tiny.make(), 1), 5) == 0
    assert pin_tokens(make_prompt_cache(tiny.make(), None, policy="full"), 5) == 0


def test_what_was_seen_cannot_be_pinned():
    model = tiny.make()
    caches = make_prompt_cache(model, 16)
    tiny.feed(model, tiny.tokens(3), caches, 3)
    with pytest.raises(CacheStateError, match="before any is seen"):
        caches[0].pin(2)


def test_rows_that_pin_more_and_less_are_what_they_are_alone():
    model = tiny.make()
    convert(model, 10, policy="fade")
    rows, alone = [], []
    for pinned, seed in ((0, 1), (3, 2), (5, 3)):
        pin_in_new_caches(model, pinned)
        caches = model.make_cache()
        tiny.feed(model, tiny.tokens(20, seed=seed), caches, 20)
        rows.append(caches)
        twin = model.make_cache()
        tiny.feed(model, tiny.tokens(20, seed=seed), twin, 20)
        alone.append(twin)
    batch = [layer[0].merge(list(layer)) for layer in zip(*rows, strict=True)]
    for i in range(8):
        tokens = mx.array([[i], [i + 3], [2 * i]])
        got = model(tokens, cache=batch)
        for row, caches in enumerate(alone):
            want = model(tokens[row : row + 1], cache=caches)
            assert mx.abs(got[row] - want[0]).max() < 1e-4
    for layer, b in enumerate(batch):
        for row, caches in enumerate(alone):
            assert mx.array_equal(b.extract(row).positions, caches[layer].positions)
            assert b.extract(row).rule == caches[layer].rule


def test_rows_of_a_batch_are_renumbered_each_when_it_is_due(often):
    model, lengths = tiny.make(), (20, 25, 31)
    alone = []
    for length in lengths:
        alone.append(make_prompt_cache(model, 10, positions="compact", journal=4))
        tiny.feed(model, tiny.tokens(length, seed=length), alone[-1], length)
    layers = zip(*copy.deepcopy(alone), strict=True)
    batch = [layer[0].merge(list(layer)) for layer in layers]

    def feed(step, read, rows):
        tokens = mx.array([[step], [step + 3], [2 * step]])
        got = read(tokens)
        for i, (row, caches) in enumerate(zip(rows(), alone, strict=True)):
            want = model(tokens[i : i + 1], cache=caches)
            assert mx.abs(got[i] - want[0]).max() < 1e-4
            for one, cache in zip(row, caches, strict=True):
                assert one.offset == cache.offset < cache.seen == one.seen
                assert mx.array_equal(one.positions, cache.positions)

    def taken_out():
        return [[layer.extract(i) for layer in batch] for i in range(len(lengths))]

    def read_apart(tokens):
        parts = [model(tokens[i : i + 1], cache=row) for i, row in enumerate(rows)]
        return mx.concatenate(parts)

    for step in range(12):
        feed(step, lambda tokens: model(tokens, cache=batch), taken_out)
    rows = taken_out()
    for step in range(12, 24):
        feed(step, read_apart, lambda: rows)
    for caches in (*rows, *alone):
        assert trim_prompt_cache(caches, 4) == 4
    feed(24, read_apart, lambda: rows)


def test_pins_are_saved(tmp_path):
    model = tiny.make()
    convert(model, 16, policy="window")
    caches = model.make_cache()
    pin_tokens(caches, 5)
    tiny.feed(model, tiny.tokens(30), caches, 30)
    save_prompt_cache(tmp_path / "a.safetensors", caches, model=model)
    loaded, _ = load_prompt_cache(tmp_path / "a.safetensors", model=model)
    assert all(c.rule.pinned == 5 for c in loaded)
    more = tiny.tokens(10, seed=2)
    want = tiny.feed(model, more, caches, 3)
    assert mx.array_equal(tiny.feed(model, more, loaded, 3), want)


def test_the_period_is_the_block_of_a_chunk():
    """Renumbering costs one part of a chunk where a block would begin anyway."""
    from tova_mlx.attention.softmax import BLOCK

    assert PERIOD == BLOCK
    assert replace(Renumbering(), start=5).next_after(0) == PERIOD
