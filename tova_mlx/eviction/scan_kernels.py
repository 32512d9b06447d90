"""The prefill scan as three Metal kernels, which take turns over 64 rows of the block.

Rows (one per query of the block) depend on each other only by who was evicted. So

1. `rows`, on the whole GPU, one threadgroup per chooser and row, takes all that does
   not depend on it: per head the maximum and the sum of the exponentials of the columns
   held when these rows began.
2. `scan`, one threadgroup per chooser, goes through the rows in order. It takes what
   was evicted since these rows began out of the sums, and finds the victim from lower
   bounds of all columns' scores and the exact scores of a few.
3. `scores`, on the whole GPU, one thread per chooser and column, takes exact scores
   from the sums that the scan leaves: after the last row, and before the last steps if
   they are wanted.

The lower bounds are the scores that there would be if none of these rows evicted
anything: with fewer columns to divide a head's weights among, each gets more, at most
by the greatest ratio, over the heads, of a sum to what is left of it. So a column whose
bound is above that ratio times the lowest bound cannot have the lowest score; with
memory, that ratio is the greatest of the rows so far. `rows` takes the bounds of a rule
without memory, which are of one row; those of one with memory add up over the rows, and
`scores` takes them before the scan. The scan takes an exact score from the logits of
one column: of the row without memory, with memory of all these rows so far.

A sum that loses most of itself loses digits. A head with less than `_LOST` of its sum
left is taken again, from the logits of the columns held. What is not a number counts as
0, so that the victim is a column held whatever comes. A head that sees none of the
columns held, but saw one that was evicted, gives 0 where the bound says more: then all
columns are taken exactly.

Counted (scripts/count_scan.py) in docs/metal.md. Time was not measured.
"""

import functools
import itertools
from typing import Any

import mlx.core as mx

from ..policies import Rule
from ..policies.metal import MAX_COLUMNS, SIMDGROUPS, THREADS
from .scan import Columns, ScanResult
from .scan_sources import HEADER, ROWS_SOURCE, SCAN_SOURCE, SCORES_SOURCE

# Rows that the kernels take at a time. With fewer of them, a row has fewer columns to
# take out of its sums, and closer bounds; but there are more launches.
ROWS = 64

# Rows times heads, of which the scan keeps two numbers each in threadgroup memory: half
# of the 32 KiB that there are.
_MOST_KEPT = 2048

# MLX compiles a kernel again whenever an input comes to have less than 8 elements or
# ceases to. With as many rows no output of the first kernel has.
_FEWEST_ROWS = 8

# There are many threadgroups of these.
_ROW_THREADS = 256

# A sum of 768 exponentials has 1e-7 of itself wrong; of what is left of it, 2e-6.
_LOST = 0.05

# What scores may lose to denormals in all heads and rows; ratios that bound nothing.
_SLACK, _BOUNDLESS = 1e-34, 1e37

_INPUTS = ["logits", "held_until", "value_norms", "sinks", "counts"]
_SUMS = ["tops", "sums"]


@functools.cache
def _rows_kernel(shares: bool) -> Any:
    """`shares`: whether it takes those too."""
    return mx.fast.metal_kernel(
        name="tova_rows_shares" if shares else "tova_rows",
        input_names=[*_INPUTS, "positions"],
        output_names=[*_SUMS, "range", *(["shares"] if shares else [])],
        header=f"#define TOVA_SHARES {shares:d}{HEADER}",
        source=ROWS_SOURCE,
    )


@functools.cache
def _scores_kernel() -> Any:
    return mx.fast.metal_kernel(
        name="tova_scores",
        input_names=[*_INPUTS, *_SUMS, "scores", "memory"],
        output_names=["after"],
        header=HEADER,
        source=SCORES_SOURCE,
    )


@functools.cache
def _scan_kernel() -> Any:
    constants = {"LOST": _LOST, "SLACK": _SLACK, "BOUNDLESS": _BOUNDLESS}
    defined = [f"#define {name} {value}f" for name, value in constants.items()]
    return mx.fast.metal_kernel(
        name="tova_scan",
        input_names=[*_INPUTS, *_SUMS, "range", "lows", "scores", "memory"],
        output_names=["last", "left_tops", "left_sums"],
        header="\n".join([*defined, HEADER]),
        source=SCAN_SOURCE,
    )


def scan_on_gpu(
    logits: mx.array,
    columns: Columns,
    rule: Rule,
    *,
    limit: int | None,
    n_before: int = 0,
    sinks: mx.array | None = None,
) -> ScanResult:
    """As `scan_on_cpu`; nothing waits for the device.

    Scores before the last steps are those of rules with memory. Of columns that are not
    held, `scores` and `before` say nothing.
    """
    assert rule.memory or not n_before
    length, n_columns = logits.shape[2:]
    shape = columns.positions.shape
    first_evicting = (
        max(0, limit - (n_columns - length)) if limit is not None else length
    )
    last = mx.full(shape, length, mx.int32)
    began = columns.scores if rule.memory else None
    scores = mx.zeros(shape) if began is None else began
    block = _Block(logits, columns, rule, first_evicting, sinks)
    # Without memory nothing is wanted of the steps that evict nobody, but of the last.
    first = 0 if rule.memory else max(0, min(first_evicting, length - _FEWEST_ROWS))
    n_parts = -(-(length - first) // block.most_rows)
    ends = [first + (length - first) * i // n_parts for i in range(n_parts + 1)]
    before = []
    for start, stop in itertools.pairwise(ends):
        wanted = min(stop - start, max(0, stop - (length - n_before)))
        began, (last, sums) = last, block.scan(start, stop, last, scores)
        if not rule.memory and stop < length:
            continue
        after = block.scores(start, stop, began, scores, sums, wanted)
        if wanted:
            before.append(after[:, :wanted])
        # All of it is a view.
        scores = after[:, -1] if wanted else after.reshape(shape)
    earlier = mx.concatenate(before, axis=1) if before else None
    return ScanResult(last, scores, earlier)


class _Block:
    """What the kernels are given of a block, whichever of its rows they look at."""

    def __init__(
        self,
        logits: mx.array,
        columns: Columns,
        rule: Rule,
        first_evicting: int,
        sinks: mx.array | None,
    ):
        self._logits, self._positions, self._rule = logits, columns.positions, rule
        self._first_evicting = first_evicting
        norms, nothing = columns.value_norms, mx.zeros((1,))
        batch, n_heads = logits.shape[:2]
        self._heads = batch * n_heads // len(columns.positions)
        self.most_rows = ROWS
        if rule.memory:
            self.most_rows = max(1, min(ROWS, _MOST_KEPT // self._heads))
        # Else each kernel would copy what is a view.
        self._norms = nothing if norms is None else mx.contiguous(norms)
        self._sinks = nothing if sinks is None else sinks
        self._memory = mx.array([rule.memory])
        self._template = [
            # MLX compiles a kernel again when one of its name is given other types.
            ("LOGITS", logits.dtype),
            ("HEADS", self._heads),
            ("GROUP", 1 if norms is None else n_heads // norms.shape[1]),
            ("MEMORY", bool(rule.memory)),
            ("WEIGHTED", norms is not None),
            ("SINKS", sinks is not None),
        ]

    def scan(
        self, start: int, stop: int, last: mx.array, scores: mx.array
    ) -> tuple[mx.array, tuple[mx.array, mx.array]]:
        """Replay steps start to stop: `last` after them, and what `scores` asks for.

        last, scores: [R, N], as the steps before left them.
        """
        n_choices, n = self._positions.shape
        n_rows, memory = stop - start, bool(self._rule.memory)
        given = self._given(start, stop, last, 0)
        sums = [(n_choices, n_rows, self._heads)] * 2
        shapes = [*sums, (n_choices, n_rows, 2)]
        tops, totals, limits, *lows = _rows_kernel(not memory)(
            inputs=[*given, self._positions],
            template=[*self._template, ("ROW_THREADS", _ROW_THREADS)],
            grid=(n_choices * _ROW_THREADS, n_rows, 1),
            threadgroup=(_ROW_THREADS, 1, 1),
            output_shapes=shapes if memory else [*shapes, (n_choices, n_rows, n)],
            output_dtypes=[mx.float32, mx.float32, mx.int32, mx.float32][: 4 - memory],
        )
        if memory:
            began = tops, totals
            lows = [self.scores(start, stop, last, scores, began, n_rows)]
        last, *left = _scan_kernel()(
            inputs=[*given, tops, totals, limits, *lows, scores, self._memory],
            template=[
                *self._template,
                ("THREADS", THREADS),
                ("SIMDGROUPS", SIMDGROUPS),
                ("ROWS", self.most_rows),
                ("MAX_COLUMNS", MAX_COLUMNS),
            ],
            grid=(n_choices * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[(n_choices, n), *sums],
            output_dtypes=[mx.int32, mx.float32, mx.float32],
        )
        return last, (left[0], left[1])

    def scores(
        self,
        start: int,
        stop: int,
        last: mx.array,
        scores: mx.array,
        sums: tuple[mx.array, mx.array],
        n_before: int,
    ) -> mx.array:
        """Scores [R, n_before + 1, N] before the last of these steps, and after all.

        last, scores: [R, N], before the first step; sums: each head's maximum and sum
        of exponentials, [R, steps, heads].
        """
        n_choices, n = self._positions.shape
        given = self._given(start, stop, last, n_before)
        (after,) = _scores_kernel()(
            inputs=[*given, *sums, scores, self._memory],
            template=self._template,
            grid=(n, n_choices, 1),
            threadgroup=(min(n, _ROW_THREADS), 1, 1),
            output_shapes=[(n_choices, n_before + 1, n)],
            output_dtypes=[mx.float32],
        )
        return after

    def _given(
        self, start: int, stop: int, last: mx.array, n_before: int
    ) -> list[mx.array]:
        """What all kernels are given of steps start to stop."""
        sinks, recent = self._rule.n_sinks, self._rule.n_recent
        counts = [start, stop - start, sinks, recent, self._first_evicting, n_before]
        return [
            *(self._logits, last, self._norms, self._sinks),
            mx.array(counts, mx.int32),
        ]
