"""The prefill scan of the Metal kernels is that of the portable path.

Without Metal they are compiled for the CPU and run by tests/mslcheck, in its checked
build: a race, a read past an array or a divergent barrier fails like a wrong number.
"""

import mlx.core as mx
import numpy as np
import pytest
import test_kernels
from mslcheck import seeded
from scan_bugs import BUGS
from test_kernels import Case

from tova_mlx import make_prompt_cache
from tova_mlx.attention import block
from tova_mlx.eviction import choice, scan_block, scan_kernels
from tova_mlx.eviction.scan import Columns, scan_on_cpu
from tova_mlx.policies import resolve_options

kernels_run = test_kernels.kernels_run


def check(logits, columns, rule, off=1e-4, **how):
    """Everyone lives as long, and is worth as much, as in the portable path."""
    length, n = logits.shape[2:]
    want = scan_on_cpu(logits, columns, rule, **how)
    got = scan_block(logits, columns, rule, **how)
    last = np.array(want.last)
    np.testing.assert_array_equal(np.array(got.last), last, err_msg=str(rule))
    pairs = [(want.scores, got.scores, length)]
    for i in range(how.get("n_before", 0)):
        step = length - how["n_before"] + i
        pairs.append((want.before[:, i], got.before[:, i], step))
    for there, mine, step in pairs:
        held = (last >= step) & (np.arange(n) < n - length + step)
        mine, there = np.array(mine)[held], np.array(there)[held]
        np.testing.assert_allclose(mine, there, rtol=off, atol=1e-6)
    return last


def check_case(case, n_before=0):
    flat = (-1, case.n)
    scores = mx.zeros(case.positions.shape) if case.scores is None else case.scores
    columns = Columns(case.positions.reshape(flat), scores.reshape(flat), case.norms)
    how = {"limit": case.rule.max_size, "n_before": n_before, "sinks": case.sinks}
    return check(case.logits, columns, case.rule, **how)


def ordered(n_choices, n):
    """Columns whose positions are their numbers, and that are worth nothing."""
    positions = mx.broadcast_to(mx.arange(n, dtype=mx.int32), (n_choices, n))
    return Columns(positions, mx.zeros((n_choices, n)))


@pytest.mark.parametrize("first", range(0, 80, 10))
def test_a_scan_is_that_of_the_portable_path(kernels_run, first):
    for seed in range(first, first + 10):
        n_rows = 2 + seed % 17
        case = Case(seed, n_rows + seed % 41, n_rows=n_rows)
        check_case(case, min(n_rows, seed % 4) if case.rule.memory else 0)
    assert set(kernels_run) <= {
        "tova_rows",
        "tova_rows_shares",
        "tova_scan",
        "tova_scores",
    }


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_rows_are_taken_so_many_at_a_time(kernels_run, monkeypatch, rows):
    monkeypatch.setattr(scan_kernels, "ROWS", rows)
    for seed in range(8):
        n_rows = 9 + seed
        case = Case(seed, n_rows + 20, n_rows=n_rows)
        n_before = min(n_rows, 5) if case.rule.memory else 0
        kernels_run.clear()
        check_case(case, n_before)
        most = -(-n_rows // rows)
        if case.rule.memory:
            part = ["tova_rows", "tova_scores", "tova_scan", "tova_scores"]
            assert kernels_run == part * most
        else:
            # It begins where evictions do. Scores are taken when they are asked for.
            parts = kernels_run.count("tova_scan")
            assert 1 <= parts <= most
            part = ["tova_rows_shares", "tova_scan"]
            assert [k for k in kernels_run if k != "tova_scores"] == part * parts
            assert kernels_run.count("tova_scores") == 1


@pytest.mark.parametrize("seed", [3, 4, 5, 6, 7])
def test_a_scan_of_a_whole_block(kernels_run, seed):
    case = Case(seed, 256 + 200, 4, n_rows=256)
    check_case(case, 16 if case.rule.memory else 0)


def test_as_many_columns_as_promised(kernels_run):
    n = scan_kernels.MAX_COLUMNS
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((1, 1, 3, n))
    # The least are where the last flags are.
    logits[..., -40:-3] -= 15
    rule = resolve_options("tova", n - 3, {})
    last = check(mx.array(logits, mx.float32), ordered(1, n), rule, limit=n - 3)
    assert (last[0, -40:-3] < 3).sum() == 3


def test_more_columns_than_the_kernels_have_room_for_are_scanned_elsewhere(
    kernels_run, monkeypatch
):
    monkeypatch.setattr(choice, "MAX_COLUMNS", 20)
    check_case(Case(3, 21, n_rows=4))
    assert kernels_run == []
    check_case(Case(3, 20, n_rows=4))
    assert kernels_run == ["tova_rows", "tova_scores", "tova_scan", "tova_scores"]


HEAVY = [0.0, 3.0, 6.0, 12.0, 30.0, 80.0, 150.0]


@pytest.mark.parametrize("sinks", [None, -3.0, 5.0], ids=str)
@pytest.mark.parametrize("heavy", HEAVY)
@pytest.mark.parametrize("policy", ["tova", "fade", "h2o"])
def test_what_is_evicted_takes_almost_all_of_a_sum_with_it(
    kernels_run, policy, heavy, sinks
):
    # Columns 2 and 9 are the least of all until they are evicted, in steps 0 and 1.
    # From then on their logits are far above those of the columns held, by which those
    # are still to be told apart, in a head or in all.
    rng = np.random.default_rng(int(heavy))
    n_held, n_rows, n_heads = 24, 12, 4
    n = n_held + n_rows
    logits = rng.standard_normal((1, n_heads, n_rows, n))
    logits[:, :, :2, [2, 9]] = -12
    logits[:, :2, 2:, [2, 9]] += heavy
    logits[:, :, 8:, [2, 9]] += heavy
    protected = {"n_recent": 0} if policy != "tova" else {}
    rule = resolve_options(policy, n_held, {"granularity": "layer", **protected})
    norms = rng.random((1, 2, n)) + 0.5 if rule.value_weighted else None
    columns = ordered(1, n)._replace(
        value_norms=None if norms is None else mx.array(norms, mx.float32)
    )
    learned = None if sinks is None else mx.full((n_heads,), sinks)
    given = mx.array(logits, mx.float32)
    last = check(given, columns, rule, limit=n_held, sinks=learned)
    assert set(np.flatnonzero(last[0] < 2)) == {2, 9}


@pytest.mark.parametrize("policy", ["tova", "fade"])
def test_what_is_no_number_counts_until_it_is_evicted(kernels_run, policy):
    # Where a head is not a number, nobody gets anything: the oldest is evicted, and by
    # and by the column that the fault is in.
    rng = np.random.default_rng(1)
    n_held, n_rows = 16, 12
    n = n_held + n_rows
    protected = {"n_recent": 0} if policy == "fade" else {}
    rule = resolve_options(policy, n_held, protected)
    for fault in (np.nan, np.inf, -np.inf):
        logits = rng.standard_normal((2, 4, n_rows, n))
        logits[0, 1, :, 3] = fault
        logits[1, :, 4, :] = fault
        norms = mx.ones((2, 2, n)) if rule.value_weighted else None
        columns = ordered(2, n)._replace(value_norms=norms)
        last = check(mx.array(logits, mx.float32), columns, rule, limit=n_held)
        assert fault == -np.inf or last[0, 3] == 3


def test_norms_that_are_no_numbers_count_as_0(kernels_run):
    case = Case(3, 60, 4, n_rows=20)
    norms = np.array(case.norms)
    norms[:, 0, [5, 6]] = np.nan
    case.norms = mx.array(norms)
    check_case(case)


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("weighted", [False, True])
def test_ties_among_candidates_go_to_the_oldest(kernels_run, granularity, weighted):
    # All columns but a few are alike, so that all are candidates in every step.
    n_held, n_rows = 600, 20
    n = n_held + n_rows
    logits = np.zeros((2, 4, n_rows, n))
    logits[..., [0, 7, 599]] = 1
    logits[1, :, 5:, 40] = -1
    options = {"granularity": granularity, "value_weighted": weighted, "n_sinks": 3}
    rule = resolve_options("tova", n_held, options)
    columns = ordered(4 if rule.per_head else 2, n)
    if weighted:
        columns = columns._replace(value_norms=mx.ones((2, 2, n)))
    last = check(mx.array(logits, mx.float32), columns, rule, limit=n_held)
    expected = [c for c in range(3, n_rows + 4) if c != 7]
    assert np.argsort(last[0], kind="stable")[:n_rows].tolist() == expected


def test_the_least_as_if_nobody_was_evicted_is_not_always_the_victim(kernels_run):
    given, how, _ = overtaken()
    assert check(*given, **how)[:, [1, 4]].tolist() == [[0, 1]] * 2
    weights = np.exp(np.array(given[0][0, :, 1]))
    shares = weights / weights.sum(axis=1, keepdims=True)
    means = shares.reshape(2, 2, -1).mean(axis=1)
    assert (means[:, 3] < means[:, 4]).all()
    assert (means.argmin(axis=1) == 3).all()


def test_without_a_limit_nobody_is_evicted(kernels_run):
    for policy in ("tova", "fade"):
        rule = resolve_options(policy, 64, {"n_recent": 0})
        case = Case(0, 40, 4, n_rows=10)
        columns = ordered(len(case.logits), 40)
        if rule.value_weighted:
            columns = columns._replace(value_norms=mx.ones((len(case.logits), 1, 40)))
        last = check(case.logits, columns, rule, limit=None)
        assert (last == 10).all()


@pytest.mark.real_model
@pytest.mark.parametrize("policy", ["tova", "fade", "h2o"])
def test_scans_of_a_real_model(demo, text, kernels_run, monkeypatch, policy):
    # The next block of a full cache. Only some layers are compared.
    model, tokenizer = demo
    tokens = mx.array(tokenizer.encode(text)[: 128 + block.BLOCK])[None]
    caches = make_prompt_cache(model, 128, policy=policy)
    monkeypatch.setenv("TOVA_MLX_KERNELS", "off")
    model(tokens[:, :128], cache=caches)
    seen = []

    def noted(logits, columns, rule, **how):
        seen.append((logits, columns, rule, how))
        return scan_block(logits, columns, rule, **how)

    monkeypatch.setattr(block, "scan_block", noted)
    model(tokens[:, 128:], cache=caches)
    assert len(seen) == len(caches)
    monkeypatch.setenv("TOVA_MLX_KERNELS", "on")
    for logits, columns, rule, how in seen[::10]:
        del how["at_eviction"]
        last = check(logits, columns, rule, **how)
        assert ((last < block.BLOCK).sum(axis=1) == block.BLOCK).all()
    assert "tova_scan" in kernels_run


SOURCES = {
    "rows": scan_kernels.ROWS_SOURCE,
    "scores": scan_kernels.SCORES_SOURCE,
    "scan": scan_kernels.SCAN_SOURCE,
    "header": scan_kernels.HEADER,
}


def build(sources):
    """The kernels made of these sources, as a function from a number of a case."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("rows", "scores", "scan"):
            patch.setattr(scan_kernels, f"{name.upper()}_SOURCE", sources[name])
        patch.setattr(scan_kernels, "HEADER", sources["header"])
        test_kernels.forget_kernels()
        rows = {shares: scan_kernels._rows_kernel(shares) for shares in (False, True)}
        scores, scan = scan_kernels._scores_kernel(), scan_kernels._scan_kernel()
    test_kernels.forget_kernels()

    def run(number):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scan_kernels, "_rows_kernel", rows.get)
            patch.setattr(scan_kernels, "_scores_kernel", lambda: scores)
            patch.setattr(scan_kernels, "_scan_kernel", lambda: scan)
            given, how, n_rows = seeded_case(number)
            patch.setattr(scan_kernels, "ROWS", n_rows)
            result = scan_kernels.scan_on_gpu(*given, **how)
        # Of the columns held.
        held = result.last == given[0].shape[2]
        parts = [result.last, (mx.where(held, result.scores, 0) * 1e5).round()]
        if result.before is not None:
            before = mx.where(held[:, None], result.before, 0)
            parts.append((before * 1e5).round())
        return mx.concatenate([p.astype(mx.float32).reshape(-1) for p in parts])

    return run


N_CASES = 9


def seeded_case(number):
    """Arguments of a scan, how, and how many rows at once.

    0: with memory, norms and learned sinks; 1: without memory, per head; 2: many
    columns and evictions, without memory. In these some columns are hidden, some
    protected, some alike and the least of all; what they get later, when they are
    evicted, is nearly all of a sum. The others are each about one thing.
    """
    if number > 2:
        planted = (
            overtaken,
            lambda: overtaken(heavy=100.0),
            lambda: overtaken(others=0.0),
            lambda: overtaken(policy="h2o"),
            alike_in_bounds,
            near_each_other,
        )
        return planted[number - 3]()
    rng = np.random.default_rng(number)
    n_rows, n = ((11, 43), (9, 45), (40, 660))[number]
    n_held, per_head = n - n_rows, number == 1
    options = {
        "n_sinks": 0 if per_head else 2,
        "n_recent": 4,
        "granularity": "head" if per_head else "layer",
    }
    rule = resolve_options("tova" if number else "fade", n_held + 2, options)
    logits = 2 * rng.standard_normal((2, 4, n_rows, n))
    logits[..., 18:25] = -7
    logits[..., 30] = -np.inf
    # Evicted by then, in the rows before or in these.
    logits[:, :2, 4:, 18] = 1
    logits[0, :, 6:, 18:20] = 14
    logits[0, 3, 8, 18:20] = 60
    # Protected, some of them.
    logits[..., [0, 1, n - 4]] = -12
    # A number too few, and nothing to see.
    logits[1, 1, 5, 26] = np.nan
    logits[1, 2, 3, :] = -np.inf
    if number == 2:
        # Evicted one after the other; the last of them are seen again.
        logits[..., 100:140] = -15
        logits[1, :2, 36:, 120:140] = 3
    norms = rng.random((2, 2, n)) + 0.5
    norms[0, 0, 22] = np.nan
    scores = 0.03 + rng.random((2, n)) / 50
    scores[:, 18:25] = 1e-3
    scores[:, n_held:] = 0
    columns = ordered(4 if per_head else 2, n)._replace(
        scores=None if number else mx.array(scores, mx.float32),
        value_norms=None if number else mx.array(norms, mx.float32),
    )
    how = {"limit": n_held + 2, "n_before": 0 if number else 6}
    how["sinks"] = None if per_head else mx.array(rng.standard_normal(4), mx.float32)
    return (mx.array(logits, mx.float32), columns, rule), how, (4, 4, 64)[number]


def overtaken(heavy=1.0, others=None, policy="tova"):
    """Who has the least in row 1 as if nobody was evicted in row 0 is not the victim.

    A head of each chooser loses most of its sum in row 0: what it gives counts far more
    in row 1 (not the last, of which all scores are wanted anyway). Of columns 3 and 4,
    one lives by that head alone and one by the other.

    heavy: how much the head gave what it loses; others: what it gives all others in
    row 1; policy: one with memory evicts another column in row 1, and one of the two in
    row 2, in which nothing that was evicted counts.
    """
    n_held, n_rows = 6, 4
    weights = np.full((1, 4, n_rows, n_held + n_rows), 0.1)
    weights[:, :, 0, 1] = 0.01
    weights[:, :, 2, 1] = 1e-9
    for loses, other in ((0, 1), (3, 2)):
        weights[0, loses, 1, [1, 3, 4]] = heavy, 0.03, 0.002
        weights[0, other, 1, [1, 3, 4]] = 0.1, 0.002, 0.02
        if others is not None:
            weights[0, loses, 1] = others
            weights[0, loses, 1, 1] = heavy
    options = {"granularity": "head"}
    if policy == "h2o":
        options["n_recent"] = 0
        weights[:, :, 0, 2:5] = 0.012
        weights[:, :, 1, 2] = 1e-4
        weights[:, :, 2, 2:5] = 1e-9, 1e-3, 1e-3
    rule = resolve_options(policy, n_held, options)
    with np.errstate(divide="ignore"):
        given = mx.array(np.log(weights), mx.float32)
    columns = ordered(2, n_held + n_rows)
    if policy == "tova":
        norms = mx.ones((1, 2, n_held + n_rows))
        columns = columns._replace(value_norms=norms)
    return (given, columns, rule), {"limit": n_held}, 64


def alike_in_bounds():
    """Columns 12 and 13 have the same bound in row 4; the newer one has less.

    All exponentials are 1 or nothing, so sums and bounds are exact. Heads 0 and 1 see
    as many columns, but 4 that head 0 sees are evicted by then.
    """
    n_held, n_rows, off = 20, 6, -40.0
    logits = np.zeros((1, 4, n_rows, n_held + n_rows))
    logits[:, :, :4, :4] = off
    logits[0, 0, 4, [4, 5, 6, 7, 13]] = off
    logits[0, 1:, 4, :4] = off
    logits[0, 1, 4, 12] = off
    logits[0, 2:, 4, 12:14] = off
    rule = resolve_options("tova", n_held, {"granularity": "layer"})
    given = mx.array(logits, mx.float32), ordered(1, n_held + n_rows), rule
    return given, {"limit": n_held}, 64


def near_each_other():
    """Scores that differ little, over 44 rows, in which heads lose half of their sums.

    So who is the victim depends on all that went into its score, and on most columns.
    """
    rng = np.random.default_rng(8)
    n_held, n_rows = 56, 44
    n = n_held + n_rows
    logits = rng.standard_normal((2, 4, n_rows, n)) / 2
    logits[:, :, 33:] *= 5
    logits[..., :4] -= 4
    logits[:, :2, 4:, :4] += 7
    rule = resolve_options("fade", n_held, {"granularity": "layer", "n_recent": 2})
    scores = rng.random((2, n)) / 5
    scores[:, n_held:] = 0
    norms = mx.array(rng.random((2, 2, n)) + 0.5, mx.float32)
    columns = Columns(ordered(2, n).positions, mx.array(scores, mx.float32), norms)
    return (mx.array(logits, mx.float32), columns, rule), {"limit": n_held}, 64


def test_the_cases_of_seeded_bugs_are_right(kernels_run, monkeypatch):
    for number in range(N_CASES):
        given, how, n_rows = seeded_case(number)
        monkeypatch.setattr(scan_kernels, "ROWS", n_rows)
        last = check(*given, **how)
        assert (last < given[0].shape[2]).any()
    assert (check(*overtaken(others=0.0)[0], limit=6)[:, 0] == 1).all()
    later = check(*overtaken(policy="h2o")[0], limit=6)
    assert later[:, [1, 2, 4]].tolist() == [[0, 1, 2]] * 2
    assert check(*alike_in_bounds()[0], limit=20)[0, 13] == 4


def test_seeded_bugs_are_found(kernels_run, capsys):
    if mx.metal.is_available():
        pytest.skip("a GPU does not say what is wrong")
    right = build(SOURCES)
    cases = [seeded.Case((i,), np.array(right(i))) for i in range(N_CASES)]
    assert not any(np.isnan(case.expected).any() for case in cases)
    results = list(seeded.outcomes(build, SOURCES, BUGS, cases))
    with capsys.disabled():
        print(f"\n{seeded.table(results)}")
    assert len(results) >= 60
    assert all(result.as_expected and result.found for result in results)
