import pytest

from tova_mlx import POLICIES
from tova_mlx.errors import OptionError
from tova_mlx.policies import resolve_options

# Of 65 tokens: per layer or head, memory, value-weighted, sinks, recent.
DEFAULTS = {
    "full": ("layer", 0, False, 0, 0),
    "window": ("layer", 0, False, 0, 0),
    "streaming": ("layer", 0, False, 4, 0),
    "h2o": ("head", 1, False, 0, 32),
    "tova": ("layer", 0, False, 0, 0),
    "vatp": ("head", 1, True, 0, 32),
    "fade": ("layer", 0.9, True, 0, 16),
    "keydiff": ("head", 0, False, 0, 0),
}


def test_defaults_are_those_of_the_papers():
    for policy, wanted in DEFAULTS.items():
        rule = resolve_options(policy, 65, {})
        counts = rule.n_sinks, rule.n_recent
        assert (rule.granularity, rule.memory, rule.value_weighted, *counts) == wanted
        reads = rule.reads_attention, rule.score is not None
        attention = policy in ("h2o", "tova", "vatp", "fade")
        assert reads == (attention, policy == "keydiff"), policy
        assert rule.max_size == (None if policy == "full" else 65)


@pytest.mark.parametrize("policy", [p for p in DEFAULTS if p != "full"])
@pytest.mark.parametrize("size", [5, 6, 13, 64])
@pytest.mark.parametrize("n", [0, 1, 3, 6, 100])
def test_pinned_tokens_are_first_ones_and_leave_one_to_be_evicted(policy, size, n):
    before = resolve_options(policy, size, {})
    rule = before.pinning(n)
    assert rule.pinned == min(n, size // 2)
    assert rule.n_sinks == max(before.n_sinks, rule.pinned)
    # Fewer recent ones only where there is no room.
    room = size - 1 - rule.n_sinks
    assert rule.n_recent == min(before.n_recent, room)
    assert room >= 0


@pytest.mark.parametrize("size", [0, -3, 2.0, "8", None, True])
@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "full"])
def test_a_size_that_is_no_count_is_refused(policy, size):
    with pytest.raises(OptionError, match=f"{policy}: max_size=.*Use 1 or more"):
        resolve_options(policy, size, {})


@pytest.mark.parametrize(
    ("policy", "size", "options", "message"),
    [
        ("streaming", 4, {}, "streaming: max_size=4 leaves no room after n_sinks=4"),
        ("tova", 5, {"n_sinks": 2, "n_recent": 3}, "Use at least 6"),
        ("window", 8, {"n_sinks": 2}, "window does not read n_sinks=2"),
        ("full", 8, {"granularity": "head"}, "full does not read granularity"),
        ("streaming", 8, {"memory": 0.5}, "does not read memory"),
        ("tova", 8, {"granularity": "both"}, "Use 'layer' or 'head'"),
        ("fade", 8, {"memory": 1.5}, "Use a number from 0 to 1"),
        ("fade", 8, {"memory": float("nan")}, "Use a number from 0 to 1"),
        ("fade", 8, {"value_weighted": 1}, "Use one of them"),
        ("tova", 8, {"n_recent": -1}, "n_recent=-1"),
        ("tova", 2**31 - 1, {}, "Use at most 2147483646, or policy full"),
        ("h2o", 2**40, {}, "max_size=1099511627776"),
        ("lru", 8, {}, "Use one of: full, window, streaming"),
    ],
)
def test_options_that_cannot_work_are_refused(policy, size, options, message):
    with pytest.raises(OptionError, match=message):
        resolve_options(policy, size, options)


def test_one_token_more_than_the_protected_is_enough():
    assert resolve_options("streaming", 5, {}).max_size == 5
    assert resolve_options("h2o", 1, {}).n_recent == 0
