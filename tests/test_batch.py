"""Rows of a batch are what they would be alone, whoever joins or leaves."""

import mlx.core as mx
import numpy as np
import pytest
import tiny
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_map
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models import cache as mlx_lm_cache
from test_cache import CASES

from tova_mlx import PolicyKVCache, convert, describe, make_prompt_cache, revert
from tova_mlx.caches.batch import BatchPolicyKVCache
from tova_mlx.errors import CacheStateError, UnsupportedModelError

LIMIT = 8
LONGEST = 20 * LIMIT
CLOSE = 1e-4
# A code that flips by rounding is a step of the code in the next layer.
FLIPPED = 2e-2


class Row:
    """One text, what it gives alone, and how much of it was fed."""

    def __init__(self, model, length, seed, options):
        self.tokens = tiny.tokens(length + 40, seed=seed)[0]
        caches = make_prompt_cache(model, LIMIT, **options)
        logits = tiny.feed(model, self.tokens[None], caches, 64)
        self.want = np.array(logits[0])
        self.length, self.fed = length, 0

    def take(self, n):
        self.fed += n
        return self.tokens[self.fed - n : self.fed].tolist()


class Batch:
    """Rows in one list of caches, driven as mlx-lm's generator does."""

    def __init__(self, model, rows, options, chunk):
        self.model, self.rows, self.options = model, rows, options
        single = [make_prompt_cache(model, LIMIT, **options) for _ in rows]
        self.caches = [layer[0].merge(layer) for layer in zip(*single, strict=True)]
        self.read([row.length for row in rows], chunk)

    def read(self, lengths, chunk):
        """Prompts of unequal lengths, padded on the right, in chunks."""
        taken = [r.take(n) for r, n in zip(self.rows, lengths, strict=True)]
        longest = max(lengths)
        padded = mx.array([t + [0] * (longest - len(t)) for t in taken])
        padding = [longest - n for n in lengths]
        if max(padding):
            for cache in self.caches:
                cache.prepare(lengths=lengths, right_padding=padding)
        logits = tiny.feed(self.model, padded, self.caches, chunk)
        if max(padding):
            for cache in self.caches:
                cache.finalize()
        for row, n, got in zip(self.rows, lengths, np.array(logits), strict=True):
            self.check(row, got[:n])

    def step(self):
        tokens = mx.array([row.take(1) for row in self.rows])
        logits = np.array(tiny.feed(self.model, tokens, self.caches, 1))
        for row, got in zip(self.rows, logits, strict=True):
            self.check(row, got)

    def check(self, row, got):
        want = row.want[row.fed - len(got) : row.fed]
        close = FLIPPED if "kv_bits" in self.options else CLOSE
        np.testing.assert_allclose(got, want, atol=close, rtol=0)
        assert not np.isnan(got).any()

    def join(self, other):
        for mine, theirs in zip(self.caches, other.caches, strict=True):
            mine.extend(theirs)
        self.rows += other.rows

    def leave(self, i):
        """Row i goes; what it kept is what it would have kept alone."""
        row = self.rows[i]
        alone = make_prompt_cache(self.model, LIMIT, **self.options)
        tiny.feed(self.model, row.tokens[None, : row.fed], alone, 64)
        for cache, mine in zip(self.caches, alone, strict=True):
            got = cache.extract(i)
            assert type(got) is type(mine)
            if not isinstance(mine, PolicyKVCache):
                continue  # what the model bounds itself
            assert (got.offset, got.size()) == (row.fed, mine.size())
            assert got.shares == mine.shares
            assert mx.array_equal(got.positions, mine.positions)
        keep = [j for j in range(len(self.rows)) if j != i]
        for cache in self.caches:
            cache.filter(keep)
        self.rows.pop(i)


@pytest.fixture(scope="module")
def model():
    return tiny.make()


lengths = st.lists(
    st.one_of(st.integers(1, 2 * LIMIT), st.integers(1, LONGEST)),
    min_size=5,
    max_size=7,
)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.integers(1, 6)),
        st.tuples(st.just("leave"), st.integers(0, 6)),
        st.tuples(st.just("join"), st.lists(st.integers(1, LONGEST), max_size=3)),
        st.tuples(st.just("read"), st.integers(2, 5)),
    ),
    min_size=4,
    max_size=7,
)


@pytest.mark.parametrize(("policy", "options"), CASES)
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(lengths=lengths, actions=actions, chunk=st.sampled_from([3, 16, 200]))
def test_a_row_is_what_it_would_be_alone(
    model, policy, options, lengths, actions, chunk
):
    options = {"policy": policy, **options}
    seeds = iter(range(1000))

    def rows(lengths):
        return [Row(model, n, next(seeds), options) for n in lengths]

    batch = Batch(model, rows(lengths), options, chunk)
    for what, value in actions:
        if what == "step":
            for _ in range(value):
                batch.step()
        elif what == "leave" and len(batch.rows) > 1:
            batch.leave(value % len(batch.rows))
        elif what == "join" and value:
            batch.join(Batch(model, rows(value), options, chunk))
        elif what == "read":
            batch.read([1 + (i % value) for i in range(len(batch.rows))], chunk)
    while len(batch.rows) > 1:
        batch.leave(0)


@pytest.mark.parametrize("policy", ["tova", "streaming", "fade", "full"])
@pytest.mark.parametrize("chunk", [1, 4, 50])
@pytest.mark.parametrize("kv_bits", [None, 8])
def test_padding_on_the_left_is_not_seen(policy, chunk, kv_bits):
    model = tiny.make(n_heads=4, n_kv_heads=2, head_dim=32)
    options, close = {"policy": policy}, CLOSE
    if kv_bits:
        options |= {"kv_bits": kv_bits, "kv_group_size": 32}
        close = FLIPPED
    rows = [Row(model, n, n, options) for n in (30, 1, 12)]
    single = [make_prompt_cache(model, LIMIT, **options) for _ in rows]
    caches = [layer[0].merge(layer) for layer in zip(*single, strict=True)]
    padding = [30 - row.length for row in rows]
    for cache in caches:
        cache.prepare(left_padding=padding)
    tokens = [[0] * p + r.take(r.length) for p, r in zip(padding, rows, strict=True)]
    logits = np.array(tiny.feed(model, mx.array(tokens), caches, chunk))
    assert not np.isnan(logits).any()
    for cache in caches:
        cache.finalize()
        assert cache.offset.tolist() == [30, 1, 12]
    for row, p, got in zip(rows, padding, logits, strict=True):
        np.testing.assert_allclose(got[p:], row.want[: row.length], atol=close)
    next_tokens = mx.array([row.take(1) for row in rows])
    logits = np.array(tiny.feed(model, next_tokens, caches, 1))
    for row, got in zip(rows, logits, strict=True):
        np.testing.assert_allclose(got[0], row.want[row.length], atol=close)


@pytest.mark.parametrize("policy", ["tova", "streaming", "fade", "full"])
def test_packed_rows_join_and_leave(policy):
    model = tiny.make(n_heads=4, n_kv_heads=2, head_dim=32)
    options = {"policy": policy, "kv_bits": (8, 4), "kv_group_size": 32}

    def rows(*lengths):
        return [Row(model, n, n, options) for n in lengths]

    batch = Batch(model, rows(3, 40, 1, 90, 8), options, 16)
    batch.step()
    batch.leave(1)
    batch.join(Batch(model, rows(2, 30), options, 16))
    for _ in range(9):
        batch.step()
    while len(batch.rows) > 1:
        batch.leave(0)


@pytest.mark.parametrize("policy", ["tova", "streaming", "fade", "full"])
@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_rows_of_a_model_that_shares_keys(name, policy):
    model = zoo.make(name)
    model.update(tree_map(lambda a: a * 2 if a.ndim > 1 else a, model.parameters()))
    options = {"policy": policy}

    def rows(*lengths):
        return [Row(model, n, n, options) for n in lengths]

    batch = Batch(model, rows(3, 40, 1, 90, 8), options, 16)
    for _ in range(9):
        batch.step()
    batch.leave(1)
    batch.join(Batch(model, rows(2, 30), options, 16))
    batch.step()
    batch.leave(0)


# Sinks, latents with positional scores in the mask, states, windows, caches in lists,
# keys shared among layers.
FAMILIES = [
    "gpt_oss",
    "deepseek_v3",
    "qwen3_next",
    "gemma3",
    "falcon_h1",
    "gemma3n",
    "gemma4",
]


def generated(model, prompts, max_tokens=12):
    """Greedy tokens of each prompt, all in one generator, three at a time."""
    generator = BatchGenerator(
        model, completion_batch_size=3, prefill_batch_size=2, prefill_step_size=16
    )
    uids = generator.insert(prompts, [max_tokens] * len(prompts))
    got = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for r in responses:
            got[r.uid].append(r.token)
    generator.close()
    return [got[uid] for uid in uids]


def alone(model, prompts, max_tokens=12):
    return [
        [int(t) for t, _ in generate_step(mx.array(p), model, max_tokens=max_tokens)]
        for p in prompts
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_all_kinds_batch(name):
    model = zoo.make(name)
    convert(model, LIMIT)
    sizes = [3, 40, 9, 1, 23]
    prompts = [tiny.tokens(n, seed=n)[0].tolist() for n in sizes]
    assert generated(model, prompts) == alone(model, prompts)


@pytest.mark.real_model
@pytest.mark.parametrize("policy", ["tova", "fade"])
def test_sixteen_requests_get_what_they_get_one_by_one(demo, text, policy):
    model, tokenizer = demo
    tokens = tokenizer.encode(text)
    rng = np.random.default_rng(0)
    prompts = []
    for n in [1, 2, *rng.integers(3, 220, 14)]:
        start = int(rng.integers(0, len(tokens) - n))
        prompts.append(tokens[start : start + int(n)])
    convert(model, 96, policy=policy)
    try:
        assert generated(model, prompts) == alone(model, prompts)
    finally:
        revert(model)


def test_what_cannot_be_one_batch_is_refused(model):
    one, other = PolicyKVCache(8), PolicyKVCache(9)
    with pytest.raises(CacheStateError, match="different options"):
        BatchPolicyKVCache.merge([one, other])
    rows = make_prompt_cache(model, 8)
    tiny.feed(model, tiny.tokens(4, batch=2), rows, 4)
    with pytest.raises(CacheStateError, match="a cache of 2 rows"):
        rows[0].merge([rows[0]])
    batch = BatchPolicyKVCache.merge([one])
    with pytest.raises(CacheStateError, match="different options"):
        batch.extend(BatchPolicyKVCache.merge([other]))
    with pytest.raises(CacheStateError, match="Give lengths too"):
        batch.prepare(right_padding=[3])
    batch.prepare(left_padding=[3])
    with pytest.raises(CacheStateError, match="cannot join"):
        batch.extend(BatchPolicyKVCache.merge([one]))


def test_a_batch_sees_to_it_that_attention_is_seen():
    batch = BatchPolicyKVCache.merge([PolicyKVCache(8), PolicyKVCache(8)])
    rows = mx.zeros((2, 2, 1, 4))
    batch.update_and_fetch(rows, rows)
    with pytest.raises(UnsupportedModelError, match="computes its own attention"):
        batch.update_and_fetch(rows, rows)


def test_a_batch_is_described(model):
    rows = [make_prompt_cache(model, LIMIT) for _ in range(2)]
    caches = [layer[0].merge(layer) for layer in zip(*rows, strict=True)]
    tiny.feed(model, tiny.tokens(30, batch=2), caches, [20, *[1] * 10])
    report = describe(caches)
    row = report.rows[0]
    assert (row.kind, row.policy) == ("BatchPolicyKVCache", "tova")
    assert (row.tokens_held, row.tokens_seen) == (LIMIT, 30)
    assert row.bytes_now == caches[0].nbytes == row.bytes_at_most
    assert str(report)


def test_merged_caches_are_left_as_they_are(model):
    caches = make_prompt_cache(model, LIMIT)
    tiny.feed(model, tiny.tokens(20), caches, 20)
    before = [np.array(c.positions) for c in caches]
    batch = [c.merge([c, c]) for c in caches]
    # Rows by themselves, then in a stack.
    tiny.feed(model, tiny.tokens(5, batch=2), batch, [3, 1, 1])
    assert [c.offset for c in caches] == [20] * 3
    assert all(map(np.array_equal, before, [c.positions for c in caches]))
    assert mlx_lm_cache.can_trim_prompt_cache(batch) is False


def test_a_model_with_its_own_attention_sees_no_padding():
    # It goes by the mask alone. With fewer KV heads mlx-lm's takes rows for them.
    model, options = tiny.make_own_attention(n_kv_heads=4), {"policy": "window"}
    batch = Batch(model, [Row(model, n, n, options) for n in (30, 3)], options, 16)
    batch.step()
    batch.read([2, 5], 16)
    batch.step()


def test_rows_that_join_come_behind_those_that_are_there(model):
    options = {"policy": "fade"}
    one, other = (
        Batch(model, [Row(model, n, n, options)], options, 16) for n in (3, 9)
    )
    one.join(other)
    one.step()
    one.leave(0)
    one.step()


def test_a_row_that_was_taken_out_goes_its_own_way(model):
    options = {"policy": "fade"}
    batch = Batch(model, [Row(model, n, n, options) for n in (30, 1)], options, 16)
    # Out of rows by themselves, then out of a stack.
    for _ in range(2):
        taken = [cache.extract(0) for cache in batch.caches]
        tiny.feed(model, tiny.tokens(6, seed=5), taken, [5, 1])
        batch.step()
    batch.leave(1)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_rows_may_leave_while_padded_prompts_are_read(model, side):
    options, lengths = {"policy": "fade"}, [3, 12, 20, 7]
    rows = [Row(model, n, n, options) for n in lengths]
    single = [make_prompt_cache(model, LIMIT, **options) for _ in rows]
    caches = [layer[0].merge(layer) for layer in zip(*single, strict=True)]
    padding = [22 - n for n in lengths]
    left = [{"left": n, "right": 0, "both": n // 3}[side] for n in padding]
    right = [n - before for n, before in zip(padding, left, strict=True)]
    for cache in caches:
        if side == "left":
            cache.prepare(left_padding=left)
        else:
            cache.prepare(left_padding=left, lengths=lengths, right_padding=right)
    padded = mx.array(
        [
            [0] * before + row.take(row.length) + [0] * after
            for before, row, after in zip(left, rows, right, strict=True)
        ]
    )
    kept = [2, 1]
    first = np.array(tiny.feed(model, padded[:, :8], caches, 8))
    for cache in caches:
        cache.filter(kept)
    second = np.array(tiny.feed(model, padded[mx.array(kept), 8:], caches, 5))
    for cache in caches:
        cache.finalize()
        assert cache.seen.tolist() == [20, 12]
    for i, rest in zip(kept, second, strict=True):
        got = np.concatenate([first[i], rest])[left[i] : left[i] + lengths[i]]
        np.testing.assert_allclose(got, rows[i].want[: lengths[i]], atol=CLOSE)
