import pytest

from tova_mlx import POLICIES
from tova_mlx.errors import OptionError
from tova_mlx.policies import resolve_options


def test_defaults_are_those_of_the_papers():
    assert resolve_options("tova", 64, {}).memory == 0
    assert resolve_options("tova", 64, {}).n_recent == 0
    h2o = resolve_options("h2o", 65, {})
    assert (h2o.memory, h2o.n_recent, h2o.granularity) == (1, 32, "head")
    vatp = resolve_options("vatp", 64, {})
    assert vatp.value_weighted
    assert (vatp.memory, vatp.n_recent, vatp.granularity) == (1, 32, "head")
    fade = resolve_options("fade", 64, {})
    assert (fade.memory, fade.n_recent, fade.granularity) == (0.9, 16, "layer")
    assert resolve_options("streaming", 64, {}).n_sinks == 4


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
