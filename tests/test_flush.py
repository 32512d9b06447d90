"""The kernels with the arithmetic that Apple's compiler is told to make.

Denormal float32 numbers are 0, and a product and a sum in one expression are rounded
once: results/metallib.json says so of the kernels in MLX's wheel. On Linux
tests/mslcheck does as much; on a Mac the GPU does whatever it does.
"""

import mlx.core as mx
import numpy as np
import pytest
import test_kernels
from test_kernels import NEWEST, Case, by_kernel, check_step

from tova_mlx.eviction import scan_block
from tova_mlx.eviction.scan import Columns, scan_on_cpu
from tova_mlx.policies import resolve_options

kernels_run = test_kernels.kernels_run

LIMIT = 11
# All denormal; the older is the higher, so age and score name different victims.
FAINT = slice(2, 7)
SCORES = np.arange(5, 0, -1, dtype=np.float32) * np.float32(1e-40)


# These are listed before `kernels_run`, which reads what they set.


@pytest.fixture
def as_apple_does(monkeypatch):
    monkeypatch.setenv("MSLCHECK_FLUSH", "1")
    monkeypatch.setenv("MSLCHECK_FUSED", "1")


@pytest.fixture(params=[True, False], ids=["flushed", "kept"])
def flushed(monkeypatch, request):
    """Whether denormals are 0; None on a Mac, where the GPU decides."""
    monkeypatch.setenv("MSLCHECK_FLUSH", str(int(request.param)))
    return None if mx.metal.is_available() else request.param


def test_a_step_is_that_of_the_portable_path(as_apple_does, kernels_run):
    for seed in range(20):
        check_step(Case(seed))
    assert kernels_run


def test_a_step_in_which_most_weights_are_0_is_that_of_the_portable_path(
    as_apple_does, kernels_run
):
    for seed in range(12):
        case = Case(seed)
        case.logits = case.logits * 30
        check_step(case)


def test_a_scan_holds_every_column_as_long_as_the_portable_path(
    as_apple_does, kernels_run
):
    for seed in range(10):
        n_rows = 2 + seed % 17
        case = Case(seed, n_rows + seed % 41, n_rows=n_rows)
        flat = (-1, case.n)
        scores = mx.zeros(case.positions.shape) if case.scores is None else case.scores
        columns = Columns(
            case.positions.reshape(flat), scores.reshape(flat), case.norms
        )
        how = {"limit": case.rule.max_size, "sinks": case.sinks}
        want = scan_on_cpu(case.logits, columns, case.rule, **how)
        got = scan_block(case.logits, columns, case.rule, **how)
        assert np.array_equal(np.array(want.last), np.array(got.last)), case
        assert not np.isnan(np.array(got.scores)).any()
    assert kernels_run


class Faint(Case):
    """The columns `FAINT` have denormal scores and, to every query, no weight."""

    def __init__(self, policy, n_rows=1):
        rule = self.rule = resolve_options(policy, LIMIT, {"n_recent": 1})
        n, self.group, self.sinks = LIMIT + n_rows, 1, None
        logits = np.zeros((1, 4, n_rows, n), np.float32)
        logits[..., FAINT] = -200
        scores = np.ones((1, 4 if rule.per_head else 1, n), np.float32)
        scores[..., FAINT] = SCORES
        scores[..., LIMIT:] = 0
        places = NEWEST - n + 1 + np.arange(n, dtype=np.int32)
        self.positions = mx.broadcast_to(mx.array(places), scores.shape)
        self.logits, self.scores = mx.array(logits), mx.array(scores)
        self.norms = mx.ones((1, 4, n)) if rule.value_weighted else None
        # Of the newest token.
        self.slot = mx.full((*scores.shape[:2], 1), n - 1, mx.uint32)


@pytest.mark.parametrize("policy", ["h2o", "fade"])
def test_of_denormal_scores_a_step_evicts_the_lowest_or_if_flushed_the_oldest(
    flushed, kernels_run, policy
):
    step = by_kernel(Faint(policy))
    victims, scores = np.array(step.victim), np.array(step.scores)
    assert np.isfinite(scores).all()
    found = set(victims.ravel().tolist())
    assert found in ([{2}, {6}] if flushed is None else [{2} if flushed else {6}])
    assert flushed is None or (scores[..., FAINT] == 0).all() == flushed


@pytest.mark.parametrize("policy", ["h2o", "fade"])
def test_of_denormal_scores_a_scan_evicts_by_score_or_if_flushed_by_age(
    flushed, kernels_run, policy
):
    case = Faint(policy, n_rows=4)
    flat = (-1, LIMIT + 4)
    columns = Columns(
        case.positions.reshape(flat), case.scores.reshape(flat), case.norms
    )
    got = scan_block(case.logits, columns, case.rule, limit=LIMIT)
    assert np.isfinite(np.array(got.scores)).all()
    # Every step evicts one: whom first, whom last.
    last = np.array(got.last)
    assert (np.sort(last)[:, :5] == [0, 1, 2, 3, 4]).all()
    by_age, by_score = {(2, 3, 4, 5)}, {(6, 5, 4, 3)}
    found = {tuple(order) for order in np.argsort(last, axis=1)[:, :4].tolist()}
    wanted = [by_age if flushed else by_score]
    assert found in ([by_age, by_score] if flushed is None else wanted)
