"""Intervals and lifetimes against what is worked out by hand; tables."""

import builtins
import math

import numpy as np
import pytest

from tova_mlx.errors import EvaluationError
from tova_mlx.evaluation.statistics import mean_survival, wilson
from tova_mlx.tables import table


@pytest.mark.parametrize(("hits", "n"), [(0, 3), (1, 3), (7, 7), (12, 40), (5, 10)])
def test_intervals_are_wilsons(hits, n):
    # The shares p whose distance to hits / n is z standard errors of p itself.
    z, share = 1.959963984540054, hits / n
    a, b, c = 1 + z * z / n, -(2 * share + z * z / n), share * share
    roots = [(-b + sign * math.sqrt(b * b - 4 * a * c)) / (2 * a) for sign in (-1, 1)]
    assert wilson(hits, n) == pytest.approx(roots, abs=1e-12)


def test_a_mean_survival_worked_by_hand():
    # Two leave at 1 and 3, two were seen until 2 and 4 only; at most 6.
    # Held of 4: all to 1, 3/4 to 3; two are seen at 3, and one leaves: 3/8 to the end.
    times, left = np.array([1, 2, 3, 4]), np.array([True, False, True, False])
    want = 1 * 1 + 2 * 3 / 4 + 3 * 3 / 8
    assert mean_survival(times, left, 6) == pytest.approx(want, abs=1e-12)
    nobody = np.zeros(4, bool)
    assert mean_survival(times, nobody, 6) == 6
    assert mean_survival(times, ~nobody, 6) == times.mean()


def test_without_scipy_it_is_said_what_to_install(monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(EvaluationError, match=r'pip install "tova_mlx\[eval\]"'):
        wilson(1, 2)


def test_columns_are_as_wide_as_their_widest_cell():
    rows = [("name", "size", ""), ("x", None, "a"), ("longer", 1024, "")]
    assert table(rows, "< >5 >").splitlines() == [
        "name     size",
        "x              a",
        "longer   1024",
    ]
    assert table([], "< >") == ""
