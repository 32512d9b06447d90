"""The Metal kernels do what the portable path does.

Without Metal they are compiled for the CPU and run by tests/mslcheck, in its checked
build: a race, a read past an array or a divergent barrier fails like a wrong number.
"""

import os

import mlx.core as mx
import mslcheck
import numpy as np
import pytest
import tiny
from kernel_bugs import BUGS
from mslcheck import seeded
from test_cache import CASES

from tova_mlx import make_prompt_cache
from tova_mlx.eviction import kernels, kernels_wanted, scan_kernels, step_on_gpu
from tova_mlx.eviction.scan import Columns
from tova_mlx.eviction.step import step_on_cpu
from tova_mlx.policies import resolve_options

POLICIES = ["tova", "h2o", "vatp", "fade"]
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
NEWEST = 999_999


def forget_kernels():
    """Have the kernels made anew, by whatever makes them then."""
    for made in (kernels._kernel, scan_kernels._rows_kernel, scan_kernels._scan_kernel):
        made.cache_clear()


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


def check_step(case, off=2e-5):
    """The scores of the portable path, and a victim that they allow."""
    arguments = (case.positions, case.scores, case.norms, NEWEST, case.rule)
    want, _ = step_on_cpu(case.weights(), *arguments)
    got, victim = step_on_gpu(case.logits, *arguments, evicts=True, sinks=case.sinks)
    want = np.nan_to_num(np.array(want))
    np.testing.assert_allclose(np.array(got), want, rtol=off, atol=1e-7)
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
    assert kernels_run == ["tova_step"] * 20


@pytest.mark.parametrize(
    ("n_columns", "n_heads"), [(1000, 16), (1000, 64), (4097, 8), (4097, 1)]
)
def test_a_step_over_many_columns(kernels_run, n_columns, n_heads):
    for seed in range(4):
        check_step(Case(seed, n_columns, n_heads))


def test_a_step_over_as_many_columns_as_promised(kernels_run):
    # Of the two it is MLX's softmax on the CPU that is off, by 8e-5 (the kernel 6e-7).
    check_step(Case(0, 65_536, 1), off=2e-4)


def test_one_token_is_its_own_victim(kernels_run):
    rule = resolve_options("tova", 1, {})
    arguments = (mx.zeros((1, 1, 1), mx.int32), None, None, 0, rule)
    scores, victim = step_on_gpu(mx.zeros((1, 4, 1, 1)), *arguments, evicts=True)
    assert (scores.tolist(), victim.tolist()) == ([[[1.0]]], [[[0]]])


def test_a_step_that_evicts_nobody_updates_the_scores(kernels_run):
    case = Case(1)
    arguments = (case.positions, case.scores, case.norms, NEWEST, case.rule)
    got, victim = step_on_gpu(case.logits, *arguments, evicts=False, sinks=case.sinks)
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
    assert bool(kernels_run) == caches[0].rule.reads_attention


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
    assert "tova_step" in kernels_run


def test_a_step_without_scores_begins_at_none(kernels_run):
    rule = resolve_options("h2o", 4, {"granularity": "layer"})
    logits = mx.random.normal((1, 4, 1, 5))
    positions = mx.arange(5, dtype=mx.int32).reshape(1, 1, 5)
    zeros = mx.zeros((1, 1, 5))
    got, want = (
        step_on_gpu(logits, positions, scores, None, 4, rule, evicts=True)
        for scores in (None, zeros)
    )
    assert mx.array_equal(got[0], want[0])
    assert mx.array_equal(got[1], want[1])


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


@pytest.mark.parametrize("policy", POLICIES)
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
    assert ran[: 2 * layers : 2] == ["tova_rows"] * layers
    assert all(name.startswith("tova_scan") for name in ran[1 : 2 * layers : 2])
    assert ran[2 * layers :] == ["tova_step"] * 4 * layers


def test_who_chooses_the_kernels(monkeypatch):
    monkeypatch.delenv("TOVA_MLX_KERNELS", raising=False)
    on_metal = mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)
    assert kernels_wanted() == on_metal
    monkeypatch.setenv("TOVA_MLX_KERNELS", "off")
    assert not kernels_wanted()
    monkeypatch.setenv("TOVA_MLX_KERNELS", "on")
    assert kernels_wanted()


def build(sources):
    """The kernels made of these sources, as a function from a number of a case."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_SOURCE", sources["source"])
        patch.setattr(kernels, "_HEADER", sources["header"])
        kernels._kernel.cache_clear()
        made = {key: kernels._kernel(*key) for key in ((False, False), (True, True))}
    kernels._kernel.cache_clear()

    def run(number):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "_kernel", lambda *key: made[key])
            return seeded_case(number)

    return run


def seeded_case(number):
    """Everything that the kernels say of a case, rounded, in one array.

    0: a step, 1: a step that evicts nobody, 2: a block. Columns 18 to 24 are alike and
    the least of those that may leave.
    """
    rng = np.random.default_rng(number)
    n, n_rows = (45, 9) if number == 2 else (300, 1)
    n_held = n - n_rows
    limit = n_held + (2 if number == 2 else 0)
    rule = resolve_options("fade", limit, {"n_sinks": 1, "n_recent": 4})
    logits = 3 * rng.standard_normal((2, 4, n_rows, n))
    logits[..., 18:25] = -9
    # By then it is dead.
    logits[..., 5:, 18] = 5
    logits[..., 30] = -np.inf
    norms = rng.random((2, 2, n)) + 0.5
    norms[..., 18:25] = 1
    scores = 0.05 + rng.random((2, n)) / 9
    scores[:, 18:25] = 1e-3
    scores[:, n_held:] = 0
    # Protected.
    for column in (0, n - 4):
        logits[..., column], scores[:, column] = -20, 0
    logits[0, 1, n_rows // 2, 5] = np.nan if number else 0
    places = np.broadcast_to(np.arange(n, dtype=np.int32), (2, n))
    given = [mx.array(a, mx.float32) for a in (logits, scores, norms)]
    sinks = mx.array(rng.standard_normal(4), mx.float32)
    if number == 2:
        logits, scores, norms = given
        how = {"first_evicting": 2, "block": True, "n_before": 2, "sinks": sinks}
        columns = Columns(mx.array(places), scores, norms)
        newest = mx.full((8,), n - 1, mx.int32)
        new_scores, last, before = kernels._launch(logits, columns, newest, rule, **how)
        parts = [last, (before * 1000).round(), (new_scores * 1000).round()]
    else:
        order = mx.array(rng.permuted(places, axis=1).argsort(axis=1))[:, None]
        columns = mx.broadcast_to(order[:, :, None], given[0].shape)
        logits = mx.take_along_axis(given[0], columns, axis=3)
        scores = mx.take_along_axis(given[1][:, None], order, axis=2)
        norms = mx.take_along_axis(given[2], mx.repeat(order, 2, axis=1), axis=2)
        arguments = (logits, order.astype(mx.int32), scores, norms, n - 1, rule)
        how = {"evicts": number == 0, "sinks": sinks}
        new_scores, victim = step_on_gpu(*arguments, **how)
        parts = [(new_scores * 1000).round(), *([] if victim is None else [victim])]
    return mx.concatenate([p.astype(mx.float32).reshape(-1) for p in parts])


def test_seeded_bugs_are_found(kernels_run, capsys):
    if mx.metal.is_available():
        pytest.skip("a GPU does not say what is wrong")
    sources = {"source": kernels._SOURCE, "header": kernels._HEADER}
    right = build(sources)
    cases = [seeded.Case((i,), np.array(right(i))) for i in range(3)]
    assert not any(np.isnan(case.expected).any() for case in cases)
    results = list(seeded.outcomes(build, sources, BUGS, cases))
    with capsys.disabled():
        print(f"\n{seeded.table(results)}")
    assert len(results) >= 30
    assert all(result.as_expected and result.found for result in results)
