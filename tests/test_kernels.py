"""The Metal kernels do what the portable path does.

Without Metal they are compiled for the CPU and run by tests/mslcheck, in its checked
build: a race, a read past an array or a divergent barrier fails like a wrong number.
"""

import os
import sys
from pathlib import Path

import mlx.core as mx
import mslcheck
import numpy as np
import pytest
import tiny
from kernel_bugs import BUGS
from mslcheck import seeded
from test_cache import CASES

from tova_mlx import make_prompt_cache
from tova_mlx.attention import block
from tova_mlx.eviction import (
    choice_kernel,
    choose_on_gpu,
    choose_victim,
    kernels_wanted,
    scored_scan,
    step_kernel,
    step_on_gpu,
)
from tova_mlx.eviction.step import step_on_cpu
from tova_mlx.policies import keydiff, keydiff_kernel, resolve_options
from tova_mlx.storage import metal
from tova_mlx.storage.entries import arrays_of, gather
from tova_mlx.storage.fields import Fresh
from tova_mlx.storage.formats import storage_for

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from count_dispatches import KERNELS

POLICIES = ["tova", "h2o", "vatp", "fade"]
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
NEWEST = 999_999


@pytest.fixture
def kernels_run(monkeypatch):
    """Kernels wherever evictions are; the names of those that ran."""
    reason = None if mx.metal.is_available() else mslcheck.missing()
    if reason is not None:
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    monkeypatch.setenv("TOVA_MLX_KERNELS", "on")
    forget_kernels()
    names = []
    with mslcheck.checked_kernels():
        make = mx.fast.metal_kernel

        def counted(name, **how):
            kernel = make(name=name, **how)
            return lambda **given: names.append(name) or kernel(**given)

        with monkeypatch.context() as patch:
            patch.setattr(mx.fast, "metal_kernel", counted)
            yield names
    forget_kernels()


def forget_kernels():
    """Kernels are made again when they are next asked for."""
    for make in KERNELS:
        make.cache_clear()


class Case:
    """Random inputs: planted ties and minima, hidden columns, heads not a number."""

    def __init__(self, seed, n_columns=None, n_heads=None, n_rows=1):
        rng = self.rng = np.random.default_rng(seed)
        self.policy = POLICIES[seed % 4]
        group = int(rng.choice([1, 4, 8]))
        n_kv_heads = int(rng.integers(1, 4))
        if n_heads is not None:
            group = min(group, n_heads)
            n_kv_heads = n_heads // group
        n_heads = n_kv_heads * group
        n = self.n = n_columns or int(rng.choice([2, 5, 31, 32, 33, 64, 100]))
        batch = int(rng.integers(1, 3))
        self.group = group
        room = n - 1
        protected = {
            "n_sinks": int(rng.integers(0, 2)) if room > 2 else 0,
            "n_recent": int(rng.integers(0, max(1, room // 2))),
        }
        granularity = ("layer", "head")[int(rng.integers(2))]
        # A step evicts when it has one more than the limit; a scan starts below it.
        self.held = room if n_rows == 1 else int(rng.integers(0, n - n_rows + 1))
        limit = room if n_rows == 1 else max(self.held, n - n_rows // 2 - 1, 4)
        self.rule = resolve_options(
            self.policy, limit, {"granularity": granularity, **protected}
        )
        choosers = n_kv_heads if self.rule.per_head else 1
        logits = rng.standard_normal((batch, n_heads, n_rows, n)) * 3
        norms = rng.random((batch, n_kv_heads, n)) + 0.5
        scores = rng.random((batch, choosers, n)) if self.rule.memory else None
        if scores is not None and n_rows > 1:
            scores[..., self.held :] = 0
        for _ in range(int(rng.integers(0, 3))):
            # All heads find these alike, and mostly the least.
            few = rng.integers(0, n, 3)
            logits[..., few] = rng.choice([-9, 0, 2])
            norms[..., few] = 1
            if scores is not None:
                scores[..., few[few < self.held]] = 0
        if rng.integers(4) == 0:
            logits[..., rng.integers(0, n, 2)] = -np.inf
        if rng.integers(4) == 0:
            where = rng.integers(0, batch), rng.integers(0, n_heads)
            logits[(*where, rng.integers(0, n_rows))] = rng.choice([np.nan, -np.inf])
        self.dtype = DTYPES[int(rng.integers(3))]
        self.logits = mx.array(logits).astype(self.dtype)
        self.scores = None if scores is None else mx.array(scores, mx.float32)
        self.norms = mx.array(norms, mx.float32) if self.rule.value_weighted else None
        self.sinks = None
        if rng.integers(3) == 0:
            self.sinks = mx.array(rng.standard_normal(n_heads), mx.float32)
        ages = np.arange(n - n_rows, 0, -1) * 3 + n_rows - 1
        ages = np.concatenate([ages, np.arange(n_rows)[::-1]])
        places = np.broadcast_to(NEWEST - ages, (batch, choosers, n))
        if self.rule.n_sinks and self.held:
            places = places.copy()
            places[..., 0] = 0
        if n_rows == 1:
            places = rng.permuted(places, axis=2)
        self.positions = mx.array(places, mx.int32)
        # Where the newest token is: its score begins at none.
        self.slot = self.positions.argmax(axis=2, keepdims=True)
        if self.scores is not None and n_rows == 1:
            zeros = mx.zeros(self.slot.shape)
            self.scores = mx.put_along_axis(self.scores, self.slot, zeros, axis=2)

    def weights(self):
        """The newest query's, as the portable path has them."""
        logits = self.logits.astype(mx.float32)
        if self.sinks is not None:
            learned = self.sinks[:, None, None]
            learned = mx.broadcast_to(learned, (*logits.shape[:3], 1))
            logits = mx.concatenate([learned, logits], axis=-1)
        weights = mx.softmax(logits, axis=-1)[..., -self.n :]
        return weights.reshape(len(weights), -1, self.group, self.n)

    def __str__(self):
        return f"{self.rule} {self.logits.shape} {self.dtype}"


def by_kernel(case, evicts=True, scale=1.0):
    """The kernel's step; what it must not read of the newest token is nonsense."""
    slot = case.slot

    def spoiled(array, nonsense):
        if array is None:
            return None
        place = mx.broadcast_to(slot, (*array.shape[:2], 1))
        filler = mx.full(place.shape, nonsense, array.dtype)
        return mx.put_along_axis(array, place, filler, axis=2)

    batch, n_kv_heads = len(case.logits), case.logits.shape[1] // case.group
    values = mx.zeros((batch, n_kv_heads, 1, 5))
    if case.norms is not None:
        place = mx.broadcast_to(slot, (batch, n_kv_heads, 1))
        norms = mx.take_along_axis(case.norms, place, axis=2)[..., None]
        values = norms * mx.array([0.6, 0, -0.8, 0, 0])
    return step_on_gpu(
        case.logits,
        spoiled(case.positions, -9),
        spoiled(case.scores, mx.nan),
        spoiled(case.norms, mx.nan),
        Fresh(slot, None, values),
        [NEWEST] * batch,
        case.rule,
        evicts=evicts,
        scale=scale,
        sinks=case.sinks,
    )


def check_step(case, off=2e-5):
    """What is known of the columns as in the portable path, and a victim it allows."""
    arguments = (case.positions, case.scores, case.norms, NEWEST, case.rule)
    want, _ = step_on_cpu(case.weights(), *arguments)
    victim, got, places, norms = by_kernel(case)
    want = np.nan_to_num(np.array(want))
    np.testing.assert_allclose(np.array(got), want, rtol=off, atol=1e-7)
    assert mx.array_equal(places, case.positions)
    if case.norms is None:
        assert norms is None
    else:
        np.testing.assert_allclose(np.array(norms), np.array(case.norms), rtol=1e-6)
    positions, victim = np.array(case.positions), np.array(victim)
    assert victim.dtype == np.uint32
    rule = case.rule
    free = (positions >= rule.n_sinks) & (positions <= NEWEST - rule.n_recent)
    assert np.take_along_axis(free, victim, axis=2).all(), case
    ranks = np.where(free, want, np.inf)
    lowest = ranks.min(axis=2, keepdims=True)
    chosen = np.take_along_axis(ranks, victim, axis=2)
    assert (chosen <= lowest * (1 + 2 * off) + 1e-7).all(), case
    tied = np.where(ranks == chosen, positions, NEWEST + 1).min(axis=2, keepdims=True)
    assert (np.take_along_axis(positions, victim, axis=2) == tied).all(), case


@pytest.mark.parametrize("first", range(0, 160, 20))
def test_a_step_is_that_of_the_portable_path(kernels_run, first):
    for seed in range(first, first + 20):
        check_step(Case(seed))
    assert len(kernels_run) == 20
    assert set(kernels_run) == {"tova_step", "tova_step_weighted"}


@pytest.mark.parametrize(
    ("n_columns", "n_heads"), [(1000, 16), (1000, 64), (4097, 8), (4097, 1)]
)
def test_a_step_over_many_columns(kernels_run, n_columns, n_heads):
    for seed in range(4):
        check_step(Case(seed, n_columns, n_heads))


def test_a_step_over_as_many_columns_as_promised(kernels_run):
    # Of the two it is MLX's softmax on the CPU that is off, by 8e-5 (the kernel 6e-7).
    check_step(Case(0, 65_536, 1), off=2e-4)


def test_logits_are_scaled_in_the_kernel(kernels_run):
    case = Case(1)
    want = by_kernel(case)
    case.logits = case.logits.astype(mx.float32) * 8
    got = by_kernel(case, scale=0.125)
    assert mx.array_equal(got.victim, want.victim)
    np.testing.assert_allclose(np.array(got.scores), np.array(want.scores), rtol=1e-5)


def test_one_token_is_its_own_victim(kernels_run):
    rule = resolve_options("tova", 1, {})
    fresh = Fresh(mx.zeros((1, 1, 1), mx.uint32), None, mx.zeros((1, 4, 1, 2)))
    arguments = (mx.zeros((1, 1, 1), mx.int32), None, None, fresh, [0], rule)
    step = step_on_gpu(mx.zeros((1, 4, 1, 1)), *arguments, evicts=True)
    assert (step.scores.tolist(), step.victim.tolist()) == ([[[1.0]]], [[[0]]])


def test_a_step_that_evicts_nobody_updates_the_scores(kernels_run):
    case = Case(1)
    arguments = (case.positions, case.scores, case.norms, NEWEST, case.rule)
    victim, got, _, _ = by_kernel(case, evicts=False)
    want, _ = step_on_cpu(case.weights(), *arguments)
    assert victim is None
    np.testing.assert_allclose(np.array(got), np.array(want), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(("policy", "options"), CASES)
def test_a_cache_driven_by_kernels_is_that_without(
    kernels_run, monkeypatch, policy, options
):
    model, tokens = tiny.make(), tiny.tokens(70, batch=2)
    sizes = [5, *[1] * 4, 21, *[1] * 8, 12, *[1] * 20]
    results = []
    for setting in ("on", "off"):
        monkeypatch.setenv("TOVA_MLX_KERNELS", setting)
        caches = make_prompt_cache(model, 16, policy=policy, **options)
        logits = tiny.feed(model, tokens, caches, sizes)
        for cache in caches:
            if cache.can_trim(3):
                cache.trim(3)
        logits = mx.concatenate(
            [logits, tiny.feed(model, tokens[:, :5], caches, 1)], axis=1
        )
        results.append((np.array(logits), [np.array(c.positions) for c in caches]))
    (got, kept), (want, kept_without) = results
    assert all(map(np.array_equal, kept, kept_without))
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.array_equal(got.argmax(-1), want.argmax(-1))
    stepped = any(name.startswith("tova_step") for name in kernels_run)
    assert stepped == caches[0].rule.reads_attention


@pytest.mark.real_model
@pytest.mark.parametrize("policy", ["tova", "fade", "streaming"])
def test_the_real_model_driven_by_kernels_is_that_without(
    kernels_run, monkeypatch, demo, text, policy
):
    model, tokenizer = demo
    prompt = mx.array(tokenizer.encode(text)[:150])[None]
    results = []
    for setting in ("on", "off"):
        monkeypatch.setenv("TOVA_MLX_KERNELS", setting)
        # The checked build takes minutes for what others of these tests check.
        with mslcheck.checked_kernels(checked=False):
            caches = make_prompt_cache(model, 40, policy=policy)
            said = []
            token = model(prompt, cache=caches)[:, -1:].argmax(axis=-1)
            for step in range(12):
                said.append(token.item())
                token = model(token, cache=caches)[:, -1:].argmax(axis=-1)
                if step == 8:
                    assert all(cache.trim(3) == 3 for cache in caches)
        results.append((said, [np.array(c.positions) for c in caches]))
    (said, kept), (said_without, kept_without) = results
    assert said == said_without
    assert all(map(np.array_equal, kept, kept_without))


@pytest.mark.real_model
def test_blocks_of_keydiff_on_the_real_model_are_the_portable_ones_but_for_ties(
    kernels_run, monkeypatch, demo, text
):
    # Not the model as a whole: one tie that rounds otherwise and all is another text.
    model, tokenizer = demo
    blocks, scan = [], block.scored_scan

    def noted(keys, values, positions, rule, **how):
        result = scan(keys, values, positions, rule, **how)
        blocks.append((keys, positions, rule, how, np.array(result.last)))
        return result

    monkeypatch.setattr(block, "scored_scan", noted)
    monkeypatch.setenv("TOVA_MLX_KERNELS", "off")
    prompt = mx.array(tokenizer.encode(text)[:150])[None]
    mx.eval(model(prompt, cache=make_prompt_cache(model, 40, policy="keydiff")))
    monkeypatch.setenv("TOVA_MLX_KERNELS", "on")
    ties = 0
    with mslcheck.checked_kernels(checked=False):
        for keys, positions, rule, how, want in blocks[::3]:
            got = np.array(scan(keys, keys, positions, rule, **how).last)
            first = keys.shape[2] - how["length"]
            for head, (mine, theirs) in enumerate(zip(got, want, strict=True)):
                if not np.array_equal(mine, theirs):
                    ties += 1
                    check_tie(np.array(keys[0, head], np.float64), mine, theirs, first)
    assert ties <= 2


def check_tie(keys, mine, theirs, first):
    """The first decision that differs is between columns that are as like the mean."""
    step = min(np.minimum(mine, theirs)[mine != theirs])
    held = (np.arange(len(keys)) <= first + step) & (theirs >= step)
    units = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    mean = units[held].mean(axis=0)
    cosines = units @ mean / np.linalg.norm(mean)
    victims = [np.flatnonzero(last == step)[0] for last in (mine, theirs)]
    assert abs(np.subtract(*cosines[victims])) < 1e-6


@pytest.mark.parametrize("policy", ["h2o", "fade"])
def test_a_cache_is_read_within_its_arrays_after_all_was_trimmed(kernels_run, policy):
    model, tokens = tiny.make(), tiny.tokens(40)
    want = tiny.feed(model, tokens, make_prompt_cache(model, 16, policy=policy), 1)
    caches = make_prompt_cache(model, 16, policy=policy)
    tiny.feed(model, tiny.tokens(9, seed=4), caches, [8, 1])
    for cache in caches:
        assert cache.trim(9) == 9
    got = tiny.feed(model, tokens, caches, 1)
    np.testing.assert_allclose(np.array(got), np.array(want), atol=1e-4)
    assert any(name.startswith("tova_step") for name in kernels_run)


def test_a_step_without_scores_begins_at_none(kernels_run):
    rule = resolve_options("h2o", 4, {"granularity": "layer"})
    logits = mx.random.normal((1, 4, 1, 5))
    positions = mx.arange(5, dtype=mx.int32).reshape(1, 1, 5)
    zeros = mx.zeros((1, 1, 5))
    fresh = Fresh(4, None, mx.zeros((1, 4, 1, 2)))
    got, want = (
        step_on_gpu(logits, positions, scores, None, fresh, [4], rule, evicts=True)
        for scores in (None, zeros)
    )
    assert mx.array_equal(got.victim, want.victim)
    assert mx.array_equal(got.scores, want.scores)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_batch_driven_by_kernels_is_that_without(kernels_run, monkeypatch, policy):
    model = tiny.make(n_heads=4, n_kv_heads=2, head_dim=32)
    options = {"policy": policy, "kv_bits": 8, "kv_group_size": 32}
    results = []
    for setting in ("on", "off"):
        monkeypatch.setenv("TOVA_MLX_KERNELS", setting)
        rows = []
        for n in (3, 30, 12):
            rows.append(make_prompt_cache(model, 8, **options))
            tiny.feed(model, tiny.tokens(n), rows[-1], n)
        batch = [layer[0].merge(layer) for layer in zip(*rows, strict=True)]
        logits = tiny.feed(model, tiny.tokens(9, batch=3), batch, 1)
        kept = [np.array(c.extract(i).positions) for c in batch for i in range(3)]
        results.append((np.array(logits), kept))
    (got, kept), (want, kept_without) = results
    assert all(map(np.array_equal, kept, kept_without))
    np.testing.assert_allclose(got, want, atol=2e-2)


@pytest.mark.parametrize("seed", range(12))
def test_scores_of_keydiff_are_those_of_the_portable_path(kernels_run, seed):
    rng = np.random.default_rng(seed)
    batch, heads = int(rng.integers(1, 3)), int(rng.integers(1, 4))
    n, width = int(rng.choice([1, 2, 31, 100])), int(rng.choice([8, 33, 64, 160]))
    keys = rng.standard_normal((batch, heads, n, width))
    # A constant that all share: cosines are almost 1.
    keys += float(rng.choice([0, 40])) * rng.standard_normal(width)
    if n > 2:
        keys[0, 0, 1] = 0
    keys = mx.array(keys).astype(DTYPES[seed % 3])
    held = None
    if seed % 2:
        held = mx.arange(n) < mx.array(rng.integers(1, n + 1, batch))[:, None, None]
    got = np.array(keydiff_kernel.scores_on_gpu(keys, held))
    there = mx.ones((batch, 1, n), mx.bool_) if held is None else held
    pair = keydiff.prepare(keys.astype(mx.float32), None)
    want = np.array(keydiff.score(*pair, None, there))
    seen = np.broadcast_to(np.array(there), want.shape)
    scale = np.abs(want[seen]).max(initial=1e-6)
    np.testing.assert_allclose(got[seen], want[seen], rtol=1e-3, atol=2e-4 * scale)


@pytest.mark.parametrize("seed", range(16))
def test_evictions_of_keydiff_are_those_of_the_portable_path(
    kernels_run, monkeypatch, seed
):
    rng = np.random.default_rng(seed)
    batch, heads, width = int(rng.integers(1, 3)), int(rng.integers(1, 4)), 16
    held, length = int(rng.choice([0, 3, 40])), int(rng.choice([2, 9, 33]))
    n = held + length
    granularity = ("head", "layer")[seed % 2]
    n_sinks, n_recent = int(rng.integers(0, 2)), int(rng.integers(0, 3))
    # Two keys are as far from their mean: what is rounded decides.
    limit = max(n_sinks + n_recent + 3, held)
    options = {"n_sinks": n_sinks, "n_recent": n_recent, "granularity": granularity}
    rule = resolve_options("keydiff", limit, options)
    keys = rng.standard_normal((batch, heads, n, width))
    keys += float(rng.choice([0, 10])) * rng.standard_normal(width)
    if seed % 3 == 0:
        keys[:, :, rng.integers(0, n, 3)] = 0
        # Alike: the older goes first.
        keys[:, :, n // 2] = keys[:, :, n // 2 - 1]
    keys = mx.array(keys, mx.float32)
    choosers = heads if rule.per_head else 1
    places = np.arange(n) + np.where(np.arange(n) >= held, 60, 0)
    places = mx.array(np.broadcast_to(places, (batch, choosers, n)), mx.int32)
    found = []
    for setting in ("on", "off"):
        monkeypatch.setenv("TOVA_MLX_KERNELS", setting)
        scan = scored_scan(keys, keys, places, rule, limit=limit, length=length)
        found.append(np.array(scan.last))
    assert np.array_equal(*found), rule
    assert kernels_run == ["tova_keydiff_scan"]


@pytest.mark.parametrize(("columns", "runs"), [(24, True), (25, False)])
def test_keydiff_scans_wide_blocks_without_all_pairs(
    kernels_run, monkeypatch, columns, runs
):
    monkeypatch.setenv("TOVA_MLX_KERNELS", "on")
    monkeypatch.setattr(keydiff_kernel, "MAX_BYTES", 4 * 2 * 24**2)
    rule = resolve_options("keydiff", 12, {})
    shape = (1, 2, columns, 8)
    keys = mx.array(np.random.default_rng(1).standard_normal(shape), mx.float32)
    places = mx.broadcast_to(mx.arange(columns, dtype=mx.int32), shape[:3])
    scan = scored_scan(keys, keys, places, rule, limit=12, length=columns - 12)
    assert ((np.array(scan.last) == columns - 12).sum(axis=1) == 12).all()
    assert kernels_run == ["tova_keydiff_scan"] * runs


@pytest.mark.parametrize("seed", range(12))
def test_a_choice_by_scores_is_that_of_the_portable_path(kernels_run, seed):
    rng = np.random.default_rng(seed)
    batch, heads, n = int(rng.integers(1, 3)), 3, int(rng.choice([4, 33, 700]))
    granularity = ("layer", "head")[seed % 2]
    options = {"granularity": granularity, "n_sinks": seed % 3, "n_recent": seed % 2}
    rule = resolve_options("keydiff", n, options)
    choosers = heads if rule.per_head else 1
    scores = rng.integers(0, 5, (batch, heads, n)).astype(np.float32)
    order = rng.permuted(np.broadcast_to(np.arange(n), (batch, choosers, n)), axis=2)
    places = mx.array(order, mx.int32)
    slot = places.argmax(axis=2, keepdims=True)
    stale = mx.where(places == n - 1, -4, places)
    held = None
    if seed % 4 > 1:
        held = mx.array(rng.random((batch, 1, n)) < 0.8) | (places == n - 1).any(
            1, True
        )
    fresh, newest = Fresh(slot, None, None), [n - 1] * batch
    victim, written = choose_on_gpu(mx.array(scores), stale, fresh, newest, rule, held)
    assert mx.array_equal(written, places)
    means = mx.array(scores if rule.per_head else scores.mean(1, keepdims=True))
    there = None if held is None else mx.broadcast_to(held, places.shape)
    want = choose_victim(places, means, n - 1, rule, there)
    assert mx.array_equal(victim, want)


def test_a_score_that_is_not_a_number_leaves_the_victim_a_slot(kernels_run):
    rule = resolve_options("keydiff", 4, {"n_sinks": 1})
    places = mx.arange(5, dtype=mx.int32).reshape(1, 1, 5)
    known = (places, Fresh(4, None, None), [4], rule)
    victim, _ = choose_on_gpu(mx.full((1, 2, 5), mx.nan), *known)
    # All alike: the oldest that is not protected.
    assert victim.tolist() == [[[1]]] * 1 or victim.tolist() == [[[1], [1]]]


@pytest.mark.parametrize("choosers", [1, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_token_is_copied_out_of_all_arrays(kernels_run, batch, choosers):
    keys = mx.random.normal((batch, 4, 9, 48)).astype(mx.bfloat16)
    wide = mx.zeros((batch, 4, 9, 64))
    packed = storage_for(4, 32).store(mx.random.normal((batch, 4, 9, 64)), wide)[0]
    places = mx.random.randint(0, 99, (batch, choosers, 9))
    slot = mx.random.randint(0, 9, (batch, choosers, 1)).astype(mx.uint32)
    got = metal.take_slots([keys, None, packed, places], slot)
    assert got[1] is None
    for mine, entries in ((got[0], keys), (got[2], packed), (got[3], places)):
        want = arrays_of(gather(entries, slot))
        assert all(map(mx.array_equal, arrays_of(mine), want))
    assert len(kernels_run) == 1


@pytest.mark.parametrize("policy", [*POLICIES, "keydiff", "window"])
def test_nothing_waits_for_the_device(monkeypatch, policy):
    # While a graph is traced, evaluating any of it raises; so does `item`.
    monkeypatch.setenv("TOVA_MLX_KERNELS", "on")
    forget_kernels()
    model = tiny.make()
    caches = make_prompt_cache(model, 16, policy=policy)
    ran = []

    def stand_in(name, **_):
        """Outputs that depend on all inputs, for a graph that nobody evaluates."""

        def kernel(inputs, output_shapes, output_dtypes, **_):
            ran.append(name)
            one = sum(x.reshape(-1)[0].astype(mx.float32) for x in inputs)
            kinds = zip(output_shapes, output_dtypes, strict=True)
            return [mx.broadcast_to(one, shape).astype(kind) for shape, kind in kinds]

        return kernel

    monkeypatch.setattr(mx.fast, "metal_kernel", stand_in)

    def generate(prompt, token):
        model(prompt, cache=caches)
        for _ in range(4):
            token = model(token, cache=caches)[:, -1:].argmax(axis=-1)
        return [token, *(c.slots.victim for c in caches)]

    mx.compile(generate)(tiny.tokens(30), mx.array([[1]]))
    forget_kernels()
    layers = len(caches)
    of_scans = "scan", "rows", "scores"
    scans = [name for name in ran if any(part in name for part in of_scans)]
    a_block = {"window": 0, "keydiff": 1, "tova": 3}.get(policy, 4)
    assert len(scans) == a_block * layers
    steps = {"window": 0, "keydiff": 2}.get(policy, 1)
    # A journal is written from the first step on that finds a victim.
    kinds = [name for name in ran if name not in scans]
    copies = sum(name.startswith("tova_take") for name in kinds)
    assert copies == 3 * layers
    assert len(kinds) - copies == 4 * layers * steps


def test_who_chooses_the_kernels(monkeypatch):
    monkeypatch.delenv("TOVA_MLX_KERNELS", raising=False)
    on_metal = mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)
    assert kernels_wanted() == on_metal
    monkeypatch.setenv("TOVA_MLX_KERNELS", "off")
    assert not kernels_wanted()
    monkeypatch.setenv("TOVA_MLX_KERNELS", "on")
    assert kernels_wanted()


SOURCES = {
    "header": (step_kernel, "HEADER"),
    "step": (step_kernel, "_SOURCE"),
    "choice": (choice_kernel, "_SOURCE"),
    "keydiff": (keydiff_kernel, "_SOURCE"),
    "keydiff's block": (keydiff_kernel, "_SCAN_SOURCE"),
    "take": (metal, "_PART"),
}


def build(sources):
    """The kernels made of these sources, as a function from a number of a case."""

    def run(number):
        with pytest.MonkeyPatch.context() as patch:
            for name, (module, variable) in SOURCES.items():
                patch.setattr(module, variable, sources[name])
            patch.setattr(choice_kernel, "HEADER", sources["header"])
            for key, kernel in made.items():
                patch.setattr(*key, kernel)
            return seeded_case(number)

    made = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, (module, variable) in SOURCES.items():
            patch.setattr(module, variable, sources[name])
        patch.setattr(choice_kernel, "HEADER", sources["header"])
        forget_kernels()
        made[step_kernel, "_kernel"] = constant(step_kernel._kernel(True))
        made[choice_kernel, "_kernel"] = constant(choice_kernel._kernel())
        made[keydiff_kernel, "_kernel"] = constant(keydiff_kernel._kernel())
        made[keydiff_kernel, "_scan_kernel"] = constant(keydiff_kernel._scan_kernel())
        made[metal, "take_kernel"] = constant(metal.take_kernel("tova_take", 3))
    forget_kernels()
    return run


def constant(kernel):
    return lambda *_: kernel


def seeded_case(number):
    """Everything that the kernels say of a case, rounded, in one array.

    0: a step; 1: a step that evicts nobody; 2: keydiff's scores and the choice by them;
    3: tokens taken out of their slots; 4: as 2, one victim for all heads; 5, 6: the
    evictions of keydiff in a block, in each head and in all.
    """
    kinds = seeded_step, seeded_step, seeded_choice, seeded_copy, seeded_choice
    kinds += seeded_block, seeded_block
    parts = kinds[number](number)
    return mx.concatenate([p.astype(mx.float32).reshape(-1) for p in parts])


def seeded_step(number):
    """Of a step; columns 18 to 24 are alike and the least of those that may leave."""
    rng = np.random.default_rng(number)
    n = 300
    rule = resolve_options("fade", n - 1, {"n_sinks": 1, "n_recent": 4})
    logits = 3 * rng.standard_normal((2, 4, 1, n))
    logits[..., 18:25] = -9
    logits[..., 30] = -np.inf
    norms = rng.random((2, 2, n)) + 0.5
    norms[..., 18:25] = 1
    scores = 0.05 + rng.random((2, n)) / 9
    scores[:, 18:25] = 1e-3
    # Protected.
    for column in (0, n - 4):
        logits[..., column], scores[:, column] = -20, 0
    logits[0, 1, 0, 5] = np.nan if number else 0
    # Of the newest nothing is there yet.
    values = np.zeros((2, 2, 1, 40), np.float32)
    values[..., 0, 2], values[..., 0, 37] = 0.6 * norms[..., -1], 0.8 * norms[..., -1]
    norms[..., -1] = scores[:, -1] = np.nan
    places = np.broadcast_to(np.arange(n, dtype=np.int32), (2, n))
    given = [mx.array(a, mx.float32) for a in (logits, scores, norms)]
    sinks = mx.array(6 + rng.standard_normal(4), mx.float32)
    order = mx.array(rng.permuted(places, axis=1).argsort(axis=1))[:, None]
    columns = mx.broadcast_to(order[:, :, None], given[0].shape)
    logits = mx.take_along_axis(given[0], columns, axis=3) * 2
    scores = mx.take_along_axis(given[1][:, None], order, axis=2)
    norms = mx.take_along_axis(given[2], mx.repeat(order, 2, axis=1), axis=2)
    slot = order.argmax(axis=2, keepdims=True)
    places = mx.where(order == n - 1, 7, order).astype(mx.int32)
    fresh = Fresh(slot, None, mx.array(values))
    arguments = (logits, places, scores, norms, fresh, [n - 1] * 2, rule)
    how = {"evicts": number == 0, "sinks": sinks, "scale": 0.5}
    step = step_on_gpu(*arguments, **how)
    known = [(step.scores * 1000).round(), step.positions]
    known.append((step.value_norms * 1000).round())
    return [*known, *([] if step.victim is None else [step.victim])]


def seeded_choice(number):
    """Of keys that share a constant: one of length 0, the two least alike twice."""
    rng = np.random.default_rng(number)
    n, width = 70, 40
    options = {"granularity": "layer"} if number == 4 else {}
    rule = resolve_options("keydiff", n - 1, {"n_sinks": 1, "n_recent": 3, **options})
    keys = 5 + rng.standard_normal((2, 2, n, width))
    keys[:, :, 11] = 0
    held = np.ones((2, 1, n), np.bool_)
    held[1, 0, 60:] = False
    # In all heads, the older one behind the newer.
    mean = keys[:, :, :60].mean(axis=2)
    keys[:, :, 31] = keys[:, :, 30] = mean
    # As much as the mean, but protected or not there.
    keys[:, :, 40] = mean * 1.01
    keys[0, :, 42], keys[1, :, 65] = mean * 1.01
    order = rng.permutation(n)
    order[30], order[31] = max(order[30:32]), min(order[30:32])
    positions = np.broadcast_to(order, (2, 2, n)).astype(np.int32)
    positions = np.where(positions == order[40], 0, positions)
    positions = np.where(positions == order[42], n - 3, positions).astype(np.int32)
    scores = keydiff_kernel.scores_on_gpu(mx.array(keys, mx.float32), mx.array(held))
    heads = 2 if rule.per_head else 1
    slot = mx.full((2, heads, 1), 50, mx.uint32)
    fresh, newest = Fresh(slot, None, None), [n, n + 1]
    known = (mx.array(positions[:, :heads]), fresh, newest, rule, mx.array(held))
    victim, places = choose_on_gpu(scores, *known)
    return [(scores * 1000).round(), victim, places]


def seeded_block(number):
    """Of keys of which some have no length, and some are alike."""
    rng = np.random.default_rng(number)
    n, length = 60, 24
    options = {"granularity": "layer" if number == 6 else "head"}
    rule = resolve_options("keydiff", 38, {"n_sinks": 1, "n_recent": 2, **options})
    # In case 6 short means, which change much with who comes and goes.
    keys = (3 if number == 5 else 0) + rng.standard_normal((2, 2, n, 16))
    keys[:, :, 9:12] = keys[:, :, 45:47] = 0
    keys[:, :, 20] = keys[:, :, 21] = keys[:, :, :36].mean(axis=2)
    # As near the mean, but protected.
    keys[:, :, 0] = keys[:, :, 20]
    places = np.broadcast_to(np.arange(n), (2, 2 if rule.per_head else 1, n))
    found, _ = keydiff.prepare(mx.array(keys, mx.float32), None)
    how = {"first_evicting": 2, "length": length}
    places = mx.array(places, mx.int32)
    return [keydiff_kernel.evictions_on_gpu(found, places, rule, **how)]


def seeded_copy(number):
    """Of three arrays, of which each row of the batch has another slot."""
    arrays = [mx.arange(2 * 4 * 9 * 7).reshape(2, 4, 9, 7).astype(mx.float16)]
    arrays += [mx.arange(2 * 2 * 9).reshape(2, 2, 9) * 3, arrays[0] + 1]
    return metal._take(arrays, mx.array([[[4], [0]], [[8], [2]]], mx.uint32))


def test_seeded_bugs_are_found(kernels_run, capsys):
    if mx.metal.is_available():
        pytest.skip("a GPU does not say what is wrong")
    sources = {key: getattr(*where) for key, where in SOURCES.items()}
    right = build(sources)
    cases = [seeded.Case((i,), np.array(right(i))) for i in range(7)]
    assert not any(np.isnan(case.expected).any() for case in cases)
    results = list(seeded.outcomes(build, sources, BUGS, cases))
    with capsys.disabled():
        print(f"\n{seeded.table(results)}")
    assert len(results) >= 40
    assert all(result.as_expected and result.found for result in results)
