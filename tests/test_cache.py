import copy
import gc
import threading
import weakref

import mlx.core as mx
import numpy as np
import pytest
import reference
import tiny
from mlx_lm.generate import generate_step
from mlx_lm.models import cache as mlx_lm_cache

from tova_mlx import POLICIES, PolicyKVCache, TOVACache, make_prompt_cache
from tova_mlx.attention.arguments import AttentionArgs
from tova_mlx.attention.sharing import shared_with
from tova_mlx.attention.softmax import attend_newest
from tova_mlx.errors import CacheStateError, OptionError, UnsupportedModelError
from tova_mlx.hooks import dispatcher as attention
from tova_mlx.storage.fields import norms_of

READING = [p for p in POLICIES if POLICIES[p].reads_attention]
CASES = [(p, {}) for p in POLICIES if p not in READING] + [
    (p, {"granularity": g}) for p in READING for g in ("layer", "head")
]
EXTRA = [
    ("keydiff", {"granularity": "layer", "n_sinks": 2, "n_recent": 3}),
    ("tova", {"n_sinks": 3, "n_recent": 5}),
    ("tova", {"memory": 0.5, "value_weighted": True}),
    ("tova", {"value_weighted": True}),
    ("fade", {"memory": 0.5, "value_weighted": False, "n_recent": 0}),
    ("streaming", {"n_sinks": 7}),
]


@pytest.fixture(scope="module")
def model():
    return tiny.make()


def positions(caches):
    return [np.array(c.positions) for c in caches]


def random_layer(seed, n_heads, n_kv_heads, length, dim=8):
    generator = np.random.default_rng(seed)
    queries = 3 * generator.normal(size=(n_heads, length, dim))
    keys = generator.normal(size=(n_kv_heads, length, dim))
    values = generator.normal(size=(n_kv_heads, length, dim + 2))
    values *= generator.exponential(size=(n_kv_heads, length, 1))
    return queries, keys, values


@pytest.mark.parametrize(("policy", "options"), CASES + EXTRA)
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (5, 1)])
@pytest.mark.parametrize(("chunk", "block"), [(1, 256), (5, 256), (40, 256), (40, 7)])
def test_outputs_and_positions_are_those_of_the_papers(
    policy, options, heads, chunk, block, monkeypatch
):
    monkeypatch.setattr("tova_mlx.attention.block.BLOCK", block)
    arrays = random_layer(len(policy), *heads, length=40)
    cache = PolicyKVCache(11, policy, **options)
    outputs = []
    for start in range(0, 40, chunk):
        q, k, v = (
            mx.array(a[None, :, start : start + chunk].astype(np.float32))
            for a in arrays
        )
        mask = cache.make_mask(q.shape[2])
        k, v = cache.update_and_fetch(k, v)
        outputs.append(
            attention.dispatch(q, k, v, cache=cache, scale=0.35, mask=mask, sinks=None)
        )
    output = np.array(mx.concatenate(outputs, axis=2))[0]
    limit = cache.max_size or 10**9
    expected, kept = reference.run(*arrays, 0.35, limit, cache.rule.as_dict())
    assert np.abs(output - expected).max() < 1e-5
    assert np.array(cache.positions)[0].tolist() == kept


def test_keys_and_values_held_are_those_of_their_positions():
    cache = TOVACache(5)
    queries, keys, values = random_layer(3, 4, 2, length=30)
    keys[..., 0] = values[..., 0] = np.arange(30)
    for i in range(30):
        q, k, v = (
            mx.array(a[None, :, i : i + 1].astype(np.float32))
            for a in (queries, keys, values)
        )
        given = cache.update_and_fetch(k, v)
        cache.attend(q, *given, scale=0.01)
    there = np.array(cache.positions)[0, 0]
    # Else the slots themselves would lie in order.
    slots = np.array(cache.slots.positions_of(5))[0, 0]
    assert slots.tolist() != sorted(slots.tolist())
    for held in cache.keys_and_values():
        assert (np.array(held)[0, :, :, 0] == there).all()


def test_the_newest_token_has_a_position_before_it_is_attended_to(monkeypatch):
    cache = TOVACache(5, journal=0)
    one = mx.ones((1, 1, 1, 8))
    for _ in range(9):
        cache.attend(one, *cache.update_and_fetch(one, one), scale=1.0)
    # The kernel of the step will write it.
    monkeypatch.setenv("TOVA_MLX_KERNELS", "on")
    cache.update_and_fetch(one, one)
    assert np.array(cache.slots.positions_of(6)).max() == 9


def test_a_step_sees_no_weight_of_what_is_hidden_nor_of_learned_sinks():
    generator = np.random.default_rng(5)
    queries, keys, values = random_layer(5, 4, 2, length=7)
    queries, sinks = queries[:, -1:], generator.normal(size=4)
    hidden = np.array([False, True, False, False, True, False, False])
    logits = np.einsum("hld,hsd->hls", queries, keys.repeat(2, axis=0)) * 0.35
    logits[..., hidden] = -np.inf
    expected = np.exp(logits)
    expected /= expected.sum(axis=-1, keepdims=True) + np.exp(sinks)[:, None, None]
    given = (mx.array(a[None].astype(np.float32)) for a in (queries, keys, values))
    args = AttentionArgs(0.35, mx.array(~hidden), mx.array(sinks.astype(np.float32)))
    output, weights = attend_newest(*given, args)
    assert np.abs(np.array(weights).reshape(4, 1, 7) - expected).max() < 1e-6
    output = np.array(output)[0] - expected @ values.repeat(2, axis=0)
    assert np.abs(output).max() < 1e-5


@pytest.mark.parametrize("seen", [3, 4, 5, 7, 20])
@pytest.mark.parametrize("n_sinks", [0, 3])
def test_the_mask_of_a_window_shows_what_a_token_alone_would_see(seen, n_sinks):
    limit, n = 8, 5
    options = {"n_sinks": n_sinks} if n_sinks else {}
    cache = PolicyKVCache(limit, "streaming" if n_sinks else "window", **options)
    one = mx.ones((1, 1, 1, 8))
    for _ in range(seen):
        cache.update_and_fetch(one, one)
    there = np.array([*np.array(cache.positions)[0, 0], *range(seen, seen + n)])
    token = np.arange(seen, seen + n)[:, None]
    newest = there > token - (limit + 1 - n_sinks)
    expected = (there <= token) & (newest | (there < n_sinks))
    mask = np.array(cache.make_mask(n, return_array=True))
    assert np.array_equal(mask.reshape(n, -1), expected)


def test_a_window_of_the_models_is_refused_where_tokens_of_it_are_evicted():
    cache = TOVACache(8)
    one = mx.ones((1, 1, 6, 8))
    cache.attend(one, *cache.update_and_fetch(one, one), scale=1.0, mask="causal")
    mask = np.array(cache.make_mask(2, window_size=4)).reshape(2, 8)
    token, there = np.arange(6, 8)[:, None], np.arange(8)
    assert np.array_equal(mask, (there <= token) & (there > token - 4))
    with pytest.raises(UnsupportedModelError, match="a sliding window of 4 tokens"):
        cache.make_mask(3, window_size=4)


@pytest.mark.parametrize("seen", [3, 7, 20])
def test_an_array_of_a_mask_has_a_column_for_all_that_is_held(seen):
    cache = TOVACache(8)
    one = mx.ones((1, 1, 1, 8))
    for _ in range(seen):
        cache.attend(one, *cache.update_and_fetch(one, one), scale=1.0)
    mask = np.array(cache.make_mask(5, return_array=True)).reshape(5, -1)
    expected = np.tri(5, cache.size() + 5, cache.size(), bool)
    assert np.array_equal(mask, expected)


@pytest.mark.parametrize(("policy", "options"), CASES + EXTRA)
def test_chunks_of_any_size_give_the_same_logits_and_tokens(model, policy, options):
    tokens = tiny.tokens(70, batch=2)

    def run(chunk):
        caches = make_prompt_cache(model, 16, policy=policy, **options)
        return tiny.feed(model, tokens, caches, chunk), caches

    logits, caches = run(1)
    for chunk in (7, 33, 70, [20, 1, 1, 1, 9, 1, 37]):
        others, other_caches = run(chunk)
        assert mx.abs(logits - others).max().item() < 1e-3
        for mine, theirs in zip(
            positions(caches), positions(other_caches), strict=True
        ):
            assert np.array_equal(mine, theirs)


@pytest.mark.parametrize(("policy", "options"), CASES)
@pytest.mark.parametrize("chunk", [1, 9, 40])
def test_with_room_for_all_logits_are_those_of_mlx_lm(model, policy, options, chunk):
    tokens = tiny.tokens(40)
    expected = tiny.feed(model, tokens, mlx_lm_cache.make_prompt_cache(model), chunk)
    caches = make_prompt_cache(model, 40, policy=policy, **options)
    got = tiny.feed(model, tokens, caches, chunk)
    assert mx.abs(got - expected).max().item() < 1e-4


def test_without_evictions_tova_is_mlx_lm_to_the_bit(model):
    tokens = tiny.tokens(40)
    expected = tiny.feed(model, tokens, mlx_lm_cache.make_prompt_cache(model), 9)
    got = tiny.feed(model, tokens, make_prompt_cache(model, 40), 9)
    assert mx.array_equal(got, expected)


@pytest.mark.parametrize("size", [9, 16, 300])
def test_streaming_is_a_token_by_token_rotating_cache(model, size):
    tokens = tiny.tokens(60)
    rotating = [mlx_lm_cache.RotatingKVCache(size, keep=4) for _ in model.layers]
    # Our limit is reached after the newest token has attended, theirs before.
    caches = make_prompt_cache(model, size - 1, policy="streaming")
    expected = tiny.feed(model, tokens, rotating, 1)
    assert mx.abs(tiny.feed(model, tokens, caches, 13) - expected).max().item() < 1e-3


@pytest.mark.parametrize(("policy", "options"), CASES)
def test_a_slot_that_claims_a_position_holds_its_key(policy, options):
    cache = PolicyKVCache(9, policy, **options)
    generator = np.random.default_rng(3)
    for length in [5, 1, 1, 13, 1, 1, 1]:
        start = cache.offset
        marks = mx.arange(start, start + length).reshape(1, 1, length, 1)
        k = mx.broadcast_to(marks.astype(mx.float32), (1, 2, length, 4))
        q = mx.array(generator.normal(size=(1, 4, length, 4)).astype(np.float32))
        mask = cache.make_mask(length)
        keys, values = cache.update_and_fetch(k, -k)
        mx.eval(cache.attend(q, keys, values, scale=0.1, mask=mask))
        held = np.broadcast_to(np.array(cache.positions), (1, 2, cache.size()))
        keys, values = cache.keys_and_values()
        assert np.array_equal(np.array(keys[..., 0]), held)
        assert np.array_equal(np.array(values[..., 1]), -held)
        assert len(set(held[0, 0].tolist())) == cache.size()


@pytest.mark.parametrize("policy", READING)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_runs_and_keeps_its_type(policy, dtype):
    model = tiny.make()
    model.set_dtype(dtype)
    caches = make_prompt_cache(model, 16, policy=policy)
    logits = tiny.feed(model, tiny.tokens(40), caches, [30, 1, 9])
    assert logits.dtype == dtype
    assert caches[0].keys.dtype == dtype
    assert not mx.isnan(logits).any().item()


def test_norms_of_values_in_half_precision_do_not_overflow():
    # Their squares do: 64 times 40,000.
    norms = norms_of(mx.full((1, 1, 1, 64), 200.0, mx.float16))
    assert norms.dtype == mx.float32
    assert norms.item() == 1600


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_the_models_mask_is_obeyed_across_blocks(kind, granularity, monkeypatch):
    monkeypatch.setattr("tova_mlx.attention.block.BLOCK", 8)
    q, k, v = random_layer(5, 4, 2, 40)
    bias = np.tril(np.zeros((40, 40))) + np.triu(np.full((40, 40), -np.inf), 1)
    bias[5:, 3] = -np.inf  # nobody after token 4 may look at token 3
    if kind == "additive":
        bias[10:, 7] = 4.0
    mask = mx.array(np.isfinite(bias)) if kind == "bool" else mx.array(bias, mx.float32)

    def run(chunks):
        cache = TOVACache(12, granularity=granularity)
        outputs, start = [], 0
        for n in chunks:
            rows = slice(start, start + n)
            qs, ks, vs = (
                mx.array(a[None, :, rows].astype(np.float32)) for a in (q, k, v)
            )
            held = np.array(cache.positions) if start else np.zeros((1, 1, 0), int)
            own = np.broadcast_to(np.arange(start, start + n), (*held.shape[:2], n))
            columns = np.concatenate([held, own], axis=2)
            if n == 1:  # one row's columns lie in slot order
                slots = cache._slots.positions
                if slots is not None and cache._slots.victim is not None:
                    columns = np.where(
                        np.arange(slots.shape[2]) == np.array(cache._slots.victim),
                        start,
                        np.array(slots),
                    )
            per_head = np.repeat(columns, 4 // columns.shape[1], axis=1)
            cut = np.array(mask)[rows][None, None].repeat(4, axis=1)
            index = np.broadcast_to(per_head[:, :, None], (1, 4, n, columns.shape[2]))
            part = mx.array(np.take_along_axis(cut, index, axis=3))
            keys, values = cache.update_and_fetch(ks, vs)
            outputs.append(cache.attend(qs, keys, values, scale=0.5, mask=part))
            mx.eval(outputs[-1])
            start += n
        return mx.concatenate(outputs, axis=2), np.array(cache.positions)

    one, kept_one = run([1] * 40)
    for chunks in ([40], [20, 20], [3, 1, 30, 1, 1, 4]):
        other, kept_other = run(chunks)
        assert np.array_equal(kept_one, kept_other)
        assert mx.abs(one - other).max().item() < 1e-5


def test_prefill_once_depends_on_the_chunk_and_keeps_the_limit(model):
    tokens = tiny.tokens(60)
    kept = []
    for chunk in (10, 60):
        caches = make_prompt_cache(model, 16, prefill="once")
        tiny.feed(model, tokens, caches, chunk)
        assert caches[0].size() == 16
        kept.append(positions(caches)[1].tolist())
    assert kept[0] != kept[1]


def test_prefill_once_attends_to_the_whole_chunk(model):
    tokens = tiny.tokens(60)
    expected = tiny.feed(model, tokens, mlx_lm_cache.make_prompt_cache(model), 60)
    caches = make_prompt_cache(model, 16, prefill="once")
    got = tiny.feed(model, tokens, caches, 60)
    assert mx.abs(got - expected).max().item() < 1e-4


@pytest.mark.parametrize(("policy", "options"), CASES)
def test_state_goes_on_where_it_was(model, policy, options):
    tokens = tiny.tokens(50)
    caches = make_prompt_cache(model, 12, policy=policy, **options)
    tiny.feed(model, tokens[:, :40], caches, 17)
    twins = [type(c).from_state(c.state) for c in copy.deepcopy(caches)]
    expected = tiny.feed(model, tokens[:, 40:], caches, [1, 1, 5, 3])
    assert mx.array_equal(
        tiny.feed(model, tokens[:, 40:], twins, [1, 1, 5, 3]), expected
    )
    for mine, theirs in zip(positions(caches), positions(twins), strict=True):
        assert np.array_equal(mine, theirs)


def test_a_state_that_is_not_ours_is_refused():
    with pytest.raises(CacheStateError, match="Make it again"):
        TOVACache.from_state((mx.zeros(3), mx.zeros(3), 3))


@pytest.mark.parametrize(("policy", "options"), CASES)
def test_generate_step_runs_and_bytes_stay(model, policy, options):
    caches = make_prompt_cache(model, 16, policy=policy, **options)
    prompt = tiny.tokens(40)[0]
    steps = generate_step(
        prompt, model, max_tokens=40, prompt_cache=caches, prefill_step_size=11
    )
    sizes = [sum(c.nbytes for c in caches) for _ in steps]
    assert caches[0].offset == 80
    if policy != "full":
        # Once the journal holds its 16 steps.
        assert len(set(sizes[20:])) == 1
        assert max(sizes) == sum(c.max_nbytes for c in caches)


@pytest.mark.parametrize(("policy", "options"), CASES)
def test_a_decode_step_waits_for_nothing(model, policy, options):
    # Evaluating anything while a step is traced raises.
    caches = make_prompt_cache(model, 16, policy=policy, **options)
    tiny.feed(model, tiny.tokens(30), caches, 30)
    twins = copy.deepcopy(caches)
    step = mx.compile(lambda token: model(token, cache=caches))
    traced = step(mx.array([[5]]))
    assert mx.abs(traced - model(mx.array([[5]]), cache=twins)).max().item() < 1e-4


def test_an_unread_memory_does_not_pile_up_while_filling(model):
    # The scores of a filling cache are read by nobody; they must not stay lazy.
    caches = make_prompt_cache(model, 4000, policy="h2o")
    memory = []
    for i in range(60):
        mx.eval(model(mx.array([[i]]), cache=caches))
        mx.clear_cache()
        memory.append(mx.get_active_memory())
    assert memory[-1] - memory[20] < 64 * 1024


def test_a_cache_is_freed_with_its_last_name(model):
    caches = make_prompt_cache(model, 16)
    tiny.feed(model, tiny.tokens(30), caches, 10)
    watch = weakref.ref(caches[0])
    del caches
    gc.collect()
    assert watch() is None


def test_memory_is_constant_over_many_tokens(model):
    caches = make_prompt_cache(model, 64)
    peaks = []
    for _ in range(2):
        mx.reset_peak_memory()
        for i in range(300):
            mx.eval(model(mx.array([[i % 100]]), cache=caches))
        peaks.append(mx.get_peak_memory())
    assert peaks[1] <= peaks[0] * 1.02


def test_other_caches_go_to_mlx_lms_own_attention(model):
    tokens = tiny.tokens(20)
    attention.uninstall()
    expected = model(tokens, cache=mlx_lm_cache.make_prompt_cache(model))
    make_prompt_cache(model, 8)
    got = model(tokens, cache=mlx_lm_cache.make_prompt_cache(model))
    assert mx.array_equal(got, expected)


def test_the_dispatcher_can_be_taken_out():
    from mlx_lm.models import base, llama

    attention.install()
    assert llama.scaled_dot_product_attention is attention.dispatch
    attention.uninstall()
    assert llama.scaled_dot_product_attention is base.scaled_dot_product_attention
    assert base.scaled_dot_product_attention is not attention.dispatch
    attention.install()


def test_a_model_with_its_own_attention_is_refused_by_name():
    model = tiny.make_own_attention()
    with pytest.raises(UnsupportedModelError, match=r"mlx_lm\.models\.gemma2"):
        make_prompt_cache(model, 16)
    caches = [TOVACache(16) for _ in model.layers]
    with pytest.raises(UnsupportedModelError, match=r"mlx_lm\.models\.gemma2"):
        tiny.feed(model, tiny.tokens(4), caches, 1)


def test_a_window_is_right_on_a_model_with_its_own_attention():
    model = tiny.make_own_attention()
    tokens = tiny.tokens(50)
    for policy in ("window", "streaming"):
        one = tiny.feed(model, tokens, make_prompt_cache(model, 12, policy=policy), 1)
        many = tiny.feed(model, tokens, make_prompt_cache(model, 12, policy=policy), 19)
        assert mx.abs(one - many).max().item() < 1e-3


def test_prefill_options_that_cannot_work_are_refused():
    with pytest.raises(OptionError, match="does not read prefill"):
        PolicyKVCache(8, "window", prefill="once")
    with pytest.raises(OptionError, match="Use 'stepwise' or 'once'"):
        TOVACache(8, prefill="fast")


@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "full"])
def test_slots_lie_in_memory_in_order_after_a_prefill(model, policy):
    # Any other layout is copied by every later product.
    cache = make_prompt_cache(model, 16, policy=policy)
    tiny.feed(model, tiny.tokens(40), cache, 40)
    tiny.feed(model, tiny.tokens(3), cache, 1)
    assert memoryview(cache[0].keys).c_contiguous
    assert memoryview(cache[0].values).c_contiguous


@pytest.mark.parametrize("policy", ["tova", "fade"])
def test_options_of_the_recurrence_make_a_cache_of_any_model(model, policy):
    options = {"memory": 0.25, "value_weighted": False}
    for cache in make_prompt_cache(model, 8, policy=policy, **options):
        assert (cache.rule.memory, cache.rule.value_weighted) == (0.25, False)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1, 1), (1, 1), (1,), (4, 1, 1)])
@pytest.mark.parametrize("policy", ["tova", "fade", "keydiff", "window"])
@pytest.mark.parametrize("kv_bits", [None, 8])
def test_a_mask_of_one_row_is_for_all_rows(shape, policy, kv_bits):
    # 300 rows are two blocks; the mask hides every fifth column from all of them.
    queries, keys, values = random_layer(1, 4, 2, 300, dim=32)
    q, k, v = (mx.array(a[None].astype(np.float32)) for a in (queries, keys, values))
    v = v[..., :32]
    row = mx.where(mx.arange(300) % 5 == 3, -1e9, 0.0)
    mask = mx.broadcast_to(row, (*shape[:-1], 300))
    whole = mx.broadcast_to(row, (1, 4, 300, 300))

    def run(mask):
        cache = PolicyKVCache(
            40 if policy != "window" else 400,
            policy,
            kv_bits=kv_bits,
            kv_group_size=32,
        )
        stored = cache.update_and_fetch(k, v)
        output = cache.attend(q, *stored, scale=0.3, mask=mask)
        return np.array(output), np.array(cache.positions)

    got, want = run(mask), run(whole)
    assert np.array_equal(got[0], want[0])
    assert np.array_equal(got[1], want[1])


@pytest.mark.parametrize(
    ("policy", "options"),
    [("keydiff", {}), ("tova", {"value_weighted": True}), ("fade", {}), ("h2o", {})],
)
@pytest.mark.parametrize("batch", [False, True])
def test_nothing_piles_up_before_the_first_eviction(policy, options, batch):
    # What is known of a slot and read by nobody yet must not wait as a graph that
    # holds on to every step's keys: 2,000 of them are 16 MB here.
    cache = PolicyKVCache(4000, policy, **options)
    if batch:
        cache = cache.merge([cache])
    rows = mx.random.normal((1, 2, 1, 512))
    base = mx.get_active_memory()
    for _ in range(2000):
        stored = cache.update_and_fetch(rows + 1, rows + 2)
        mx.eval(cache.attend(rows, *stored, scale=0.1, mask=None))
    del stored
    assert mx.get_active_memory() - base < 1.2 * cache.nbytes


def test_what_was_taken_back_is_shared_no_more():
    cache, rows = PolicyKVCache(8), mx.arange(5.0).reshape(1, 1, 5, 1)
    cache.share()
    stored = cache.update_and_fetch(rows, rows)
    cache.attend(rows, *stored, scale=1.0, mask="causal")
    cache.trim(2)
    for held in cache.keys_and_values():
        assert held.flatten().tolist() == [0, 1, 2]


def test_layers_that_share_keys_are_found_while_other_threads_come_and_go():
    rows = mx.zeros((1, 1, 1, 8))
    failed, many = [], [PolicyKVCache(8) for _ in range(1000)]
    for cache in many:
        cache.share()

    def work():
        try:
            for _ in range(200):
                cache = PolicyKVCache(8)
                cache.share()
                stored = cache.update_and_fetch(rows, rows)
                cache.attend(rows, *stored, scale=1.0, mask=None)
                assert shared_with(stored[0]) is not None
                cache.update_and_fetch(rows, rows)
                assert shared_with(stored[0]) is None
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
