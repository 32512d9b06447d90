import mlx.core as mx
import numpy as np
import pytest
import reference

from tova_mlx import PolicyKVCache
from tova_mlx.eviction import (
    Columns,
    choose_victim,
    cut_once,
    scan_block,
    scored_scan,
    update_scores,
)
from tova_mlx.policies import resolve_options


def victim(positions, scores, newest, rule):
    scores = None if scores is None else mx.array([[scores]], mx.float32)
    return choose_victim(mx.array([[positions]], mx.int32), scores, newest, rule).item()


def test_hand_worked_step():
    # Two heads, four slots. Means .35 .05 .25 .35: slot 1 leaves.
    weights = mx.array([[[[0.4, 0.0, 0.3, 0.3], [0.3, 0.1, 0.2, 0.4]]]])
    rule = resolve_options("tova", 3, {})
    scores = update_scores(weights, None, None, rule)
    assert np.allclose(np.array(scores), [[[0.35, 0.05, 0.25, 0.35]]])
    positions = mx.arange(4).reshape(1, 1, 4)
    assert choose_victim(positions, scores, 3, rule).item() == 1


def test_hand_worked_memory_and_norms():
    # 0.9 * 1 + (.2 * 3 + .4 * 3) / 2 = 1.8 and 0.9 * 0 + (.8 + .6) / 2 = 0.7.
    weights = mx.array([[[[0.2, 0.8], [0.4, 0.6]]]])
    scores = update_scores(
        weights,
        mx.array([[[3.0, 1.0]]]),
        mx.array([[[1.0, 0.0]]]),
        resolve_options("fade", 8, {}),
    )
    assert np.allclose(np.array(scores), [[[1.8, 0.7]]])


def test_ties_go_to_the_oldest_position_not_the_first_slot():
    rule = resolve_options("tova", 4, {})
    assert victim([7, 3, 5, 4, 9], [0.1, 0.2, 0.1, 0.1, 0.5], 9, rule) == 3


def test_protected_tokens_stay_whatever_their_score():
    rule = resolve_options("tova", 4, {"n_sinks": 1, "n_recent": 2})
    assert victim([9, 0, 8, 4, 5], [0.0, 0.0, 0.0, 0.3, 0.2], 9, rule) == 4


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_broken_scores_still_give_an_unprotected_slot(value):
    rule = resolve_options("tova", 4, {"n_sinks": 1, "n_recent": 1})
    assert victim([9, 0, 3, 4, 5], [value] * 5, 9, rule) in (2, 3, 4)


def test_a_row_that_is_not_a_number_does_not_poison_the_memory():
    weights = mx.array([[[[np.nan, np.nan]]]])
    old = mx.array([[[1.0, 2.0]]])
    scores = update_scores(weights, None, old, resolve_options("h2o", 8, {}))
    assert np.allclose(np.array(scores), [[[1.0, 2.0]]])


def run_scan(logits, rule, limit, **options):
    """`last` [N] and the scores [N] of a block of one row of the batch."""
    columns = logits.shape[-1]
    positions = mx.arange(columns)[None]
    once = options.pop("once", False)
    result = scan_block(
        mx.array(logits),
        Columns(positions, mx.zeros((1, columns))),
        rule,
        limit=None if once else limit,
        **options,
    )
    if once:
        result = cut_once(result, positions, rule)
    return result.last[0].tolist(), np.array(result.scores[0])


def block(rows, n_held):
    """Logits [1, 1, L, N] of weights, -inf above the diagonal."""
    with np.errstate(divide="ignore"):
        logits = np.log(np.array(rows, np.float32))[None, None]
    length = logits.shape[2]
    hidden = np.triu(np.ones((length, length), bool), 1)
    logits[0, 0][:, n_held:][hidden] = -np.inf
    return logits


def test_hand_worked_scan():
    # Row 0 sees 0 1 2, drops 1. Row 1 sees 0 2 3: the dead column's .7 does not count.
    logits = block([[0.5, 0.1, 0.4, 0.0], [0.1, 0.7, 0.15, 0.05]], n_held=2)
    last, _ = run_scan(logits, resolve_options("tova", 2, {}), 2)
    assert last == [2, 0, 2, 1]


def test_scan_breaks_planted_ties_to_the_oldest():
    logits = block([[0.25] * 4, [0.25] * 4], n_held=2)
    assert run_scan(logits, resolve_options("tova", 2, {}), 2)[0] == [0, 1, 2, 2]


def test_a_dead_column_that_dwarfs_the_living_changes_nothing():
    # exp(-200) vanishes in float32: the living must be weighed without the dead.
    logits = block([[0.5, 0.1, 0.4, 0.0], [0.1, 0.1, 0.5, 0.4]], n_held=2)
    logits[0, 0, 1, 1] = 200.0
    assert run_scan(logits, resolve_options("tova", 2, {}), 2)[0] == [1, 0, 2, 2]


def test_broken_rows_still_evict_one_token_each():
    logits = np.full((1, 2, 4, 7), np.nan, np.float32)
    rule = resolve_options("h2o", 3, {"granularity": "layer"})
    last, scores = run_scan(logits, rule, 3)
    assert sorted(last) == [0, 1, 2, 3, 4, 4, 4]
    assert np.isfinite(scores).all()


def test_cutting_once_looks_at_everything_and_ranks_by_the_last_row():
    logits = block([[0.1, 0.2, 0.7, 0.0], [0.3, 0.1, 0.2, 0.4]], n_held=2)
    last, _ = run_scan(logits, resolve_options("tova", 2, {}), 2, once=True)
    assert last == [2, 1, 1, 2]


def test_cutting_once_drops_the_oldest_of_many_ties():
    # As many that a sort which keeps no order would mix them up.
    logits = np.random.default_rng(0).integers(0, 3, (1, 1, 1, 300)).astype(np.float32)
    rule = resolve_options("tova", 200, {})
    last, _ = run_scan(logits, rule, 200, once=True)
    ranked = sorted(range(300), key=lambda c: (logits[0, 0, 0, c], c))
    assert [c for c in range(300) if last[c] == 0] == sorted(ranked[:100])


def test_cutting_once_spares_the_protected_and_nobody_else():
    # The first and the newest are; of the others 4, 2 and 3 were attended to least.
    logits = block([[0.1, 0.3, 0.2, 0.2, 0.05, 0.15]], n_held=5)
    rule = resolve_options("tova", 3, {"n_sinks": 1, "n_recent": 1})
    assert run_scan(logits, rule, 3, once=True)[0] == [1, 1, 0, 0, 0, 1]


def test_learned_sinks_take_their_share_of_the_denominator():
    # With a sink as large as the two weights together, each share is halved.
    logits = block([[0.5, 0.5]], n_held=1)
    rule = resolve_options("h2o", 4, {"granularity": "layer"})
    _, scores = run_scan(logits, rule, 4, sinks=mx.zeros(1))
    assert np.allclose(scores, [0.25, 0.25])


def test_each_row_of_a_batch_has_the_sinks_of_its_heads():
    logits = np.tile(block([[0.5, 0.5]], n_held=1), (3, 2, 1, 1))
    for granularity in ("layer", "head"):
        rule = resolve_options("h2o", 4, {"granularity": granularity})
        n_choices = 3 if granularity == "layer" else 6
        columns = Columns(
            mx.broadcast_to(mx.arange(2), (n_choices, 2)), mx.zeros((n_choices, 2))
        )
        # The first head's sink halves its weights, the second's takes all of them.
        sinks = mx.array([0.0, 50.0])
        got = scan_block(mx.array(logits), columns, rule, limit=4, sinks=sinks).scores
        want = [0.125] if granularity == "layer" else [0.25, 0.0]
        assert np.allclose(got, np.tile(want, 3)[:, None])


def test_a_head_that_is_not_a_number_takes_its_row_with_it():
    # In a block as in a step: the others alone would say something else.
    logits = np.tile(block([[0.2, 0.3, 0.5]], n_held=2), (1, 2, 1, 1))
    logits[0, 0] = np.nan
    rule = resolve_options("h2o", 8, {"granularity": "layer"})
    assert run_scan(logits, rule, 8)[1].tolist() == [0, 0, 0]
    weights = mx.softmax(mx.array(logits), axis=-1).reshape(1, 1, 2, 3)
    assert update_scores(weights, None, None, rule).tolist() == [[[0, 0, 0]]]


def test_scores_before_the_last_rows_are_there_for_the_journal():
    logits = block([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], n_held=1)
    # As they were, not as the next step fades them.
    rule = resolve_options("tova", 8, {"memory": 0.5})
    columns = Columns(mx.arange(3)[None], mx.zeros((1, 3)))
    before = scan_block(mx.array(logits), columns, rule, limit=8, n_before=2).before
    assert np.allclose(np.array(before), [[[0, 0, 0], [0.5, 0.5, 0]]])


# Two point the same way, however long; the mean is at 22.5 degrees from them.
KEYS = mx.array([[[[2.0, 0.0], [1.0, 1.0], [5.0, 0.0], [0.0, 0.0]]]])


def test_hand_worked_likeness_of_keys():
    rule = resolve_options("keydiff", 3, {})
    length = np.hypot(2 + 0.5**0.5, 0.5**0.5)
    want = [(2 + 0.5**0.5) / length, (0.5**0.5 * 2 + 1) / length]
    every = mx.ones((1, 1, 4), mx.bool_)
    scores = rule.score(*rule.prepare(KEYS, KEYS), mx.arange(4)[None, None], every)
    got = np.array(scores)[0, 0]
    # Minus the cosines, up to a constant.
    assert np.allclose(got - got[3], [-want[0], -want[1], -want[0], 0], atol=1e-6)
    assert choose_victim(mx.arange(4)[None, None], scores, 3, rule).item() == 0


def test_hand_worked_scan_of_keys():
    # Column 2 comes, 0 and 2 are alike: the older leaves. Column 3 has no direction;
    # 1 and 2 are as far from their mean, so either may leave.
    rule = resolve_options("keydiff", 2, {})
    positions = mx.arange(4, dtype=mx.int32)[None, None]
    result = scored_scan(KEYS, KEYS, positions, rule, limit=2, length=2)
    first, *others, newest = result.last[0].tolist()
    assert (first, sorted(others), newest) == (0, [1, 2], 2)


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("chunk", [1, 7, 120])
@pytest.mark.parametrize("constant", [0, 100, 300])
def test_keys_that_share_a_large_constant_are_told_apart(constant, chunk, granularity):
    # As Qwen2.5's do: all cosines are 1 in their first digits.
    rng = np.random.default_rng(constant)
    queries, values = rng.normal(size=(4, 120, 16)), rng.normal(size=(2, 120, 16))
    keys = rng.normal(size=(2, 120, 16)) + constant * rng.normal(size=(2, 1, 16))
    arrays = [a.astype(np.float32) for a in (queries, keys, values)]
    cache = PolicyKVCache(40, "keydiff", granularity=granularity)
    for start in range(0, 120, chunk):
        q, k, v = (mx.array(a[None, :, start : start + chunk]) for a in arrays)
        mask = cache.make_mask(q.shape[2])
        k, v = cache.update_and_fetch(k, v)
        mx.eval(cache.attend(q, k, v, scale=0.3, mask=mask))
    exact = [a.astype(np.float64) for a in arrays]
    _, kept = reference.run(*exact, 0.3, 40, cache.rule.as_dict())
    assert np.array(cache.positions)[0].tolist() == kept
