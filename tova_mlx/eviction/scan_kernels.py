"""The prefill scan as two Metal kernels, which take turns over 64 rows of the block.

Rows (one per query of the block) depend on each other only by who was evicted. So

1. `rows`, on the whole GPU, one threadgroup per chooser and row, takes all that does
   not depend on it: per head the maximum and the sum of the exponentials of the columns
   held when these rows began, and the `shares`: with memory each head's exponential
   times the norm of the value; without, the score that a column would have if none of
   these rows evicted anything.
2. `scan`, one threadgroup per chooser, goes through the rows in order. It takes what
   was evicted since these rows began out of the sums, and finds the victim: with memory
   from the shares of all columns, without from the logits of a few candidates.

The candidates: with fewer columns to divide a head's weights among, each gets more, at
most by the greatest ratio, over the heads, of a sum to what is left of it. A column
whose share is above that ratio times the least share cannot have the lowest score.

A sum that loses most of itself loses digits. A head with less than `_LOST` of its sum
left is taken again, from the logits of the columns held; that row then reads the logits
of all columns. What is not a number counts as 0, so that the victim is a column held
whatever comes.

Counted (scripts/count_scan.py) on SmolLM2 with 512 + 256 columns, per row of the
sequential kernel: `tova` loads 900 and 310 exponentials, `fade` 5,500 and 280, `h2o`
2,300 and 90 per KV head. Time was not measured.
"""

import functools
import itertools
from typing import Any

import mlx.core as mx

from ..policies import Rule
from ..policies.metal import MAX_COLUMNS, SIMDGROUPS, THREADS
from .scan import Columns, ScanResult
from .scan_sources import HEADER, ROWS_SOURCE, SCAN_SOURCE

# Rows that the two kernels take at a time. With fewer of them, a row has fewer columns
# to take out of its sums; but there are more launches.
ROWS = 64

# MLX compiles a kernel again whenever an input comes to have less than 8 elements or
# ceases to. With as many rows no output of the first kernel has.
_FEWEST_ROWS = 8

# There are many threadgroups of these.
_ROW_THREADS = 256

# A sum of 768 exponentials has 1e-7 of itself wrong; of what is left of it, 2e-6.
_LOST = 0.05

_INPUTS = ["logits", "held_until", "value_norms", "sinks", "counts"]
_ROWS_OUTPUTS = ["tops", "sums", "shares", "range"]


@functools.cache
def _rows_kernel() -> Any:
    return mx.fast.metal_kernel(
        name="tova_rows",
        input_names=[*_INPUTS, "positions"],
        output_names=_ROWS_OUTPUTS,
        header=HEADER,
        source=ROWS_SOURCE,
    )


@functools.cache
def _scan_kernel(before: bool) -> Any:
    return mx.fast.metal_kernel(
        name="tova_scan_before" if before else "tova_scan",
        input_names=[*_INPUTS, *_ROWS_OUTPUTS, "scores", "memory"],
        output_names=["last", "new_scores", *(["before"] if before else [])],
        header=f"#define TOVA_BEFORE {before:d}\n#define LOST {_LOST}f{HEADER}",
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
    scores, before = columns.scores, []
    if scores is None or not rule.memory:
        scores = mx.zeros(shape)
    block = _Block(logits, columns, rule, first_evicting, sinks)
    # Without memory nothing is wanted of the steps that evict nobody, but of the last.
    first = 0 if rule.memory else max(0, min(first_evicting, length - _FEWEST_ROWS))
    n_parts = -(-(length - first) // ROWS)
    ends = [first + (length - first) * i // n_parts for i in range(n_parts + 1)]
    for start, stop in itertools.pairwise(ends):
        wanted = min(stop - start, max(0, stop - (length - n_before)))
        last, scores, *earlier = block.scan(start, stop, last, scores, wanted)
        before += earlier
    return ScanResult(last, scores, mx.concatenate(before, axis=1) if before else None)


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
        self._norms = nothing if norms is None else norms
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
        self, start: int, stop: int, last: mx.array, scores: mx.array, n_before: int
    ) -> list[mx.array]:
        """Replay steps start to stop: `last` and scores after them [R, N], and before.

        last, scores: [R, N], as the steps before left them; n_before: for how many of
        these steps `before` is wanted, [R, n_before, N] of the last ones.
        """
        n_choices, n = self._positions.shape
        n_rows, rule = stop - start, self._rule
        counts = [start, n_rows, rule.n_sinks, rule.n_recent, self._first_evicting]
        given = [self._logits, last, self._norms, self._sinks]
        given.append(mx.array([*counts, n_before], mx.int32))
        per_head = (n_choices, n_rows, self._heads)
        rows = _rows_kernel()(
            inputs=[*given, self._positions],
            template=[*self._template, ("ROW_THREADS", _ROW_THREADS)],
            grid=(n_choices * _ROW_THREADS, n_rows, 1),
            threadgroup=(_ROW_THREADS, 1, 1),
            output_shapes=[
                per_head,
                per_head,
                (*per_head, n) if rule.memory else (n_choices, n_rows, n),
                (n_choices, n_rows, 2),
            ],
            output_dtypes=[*[mx.float32] * 3, mx.int32],
        )
        shape, types = (n_choices, n), [mx.int32, mx.float32, mx.float32]
        shapes = [shape, shape, *([(n_choices, n_before, n)] if n_before else [])]
        return _scan_kernel(n_before > 0)(
            inputs=[*given, *rows, scores, self._memory],
            template=[
                *self._template,
                ("THREADS", THREADS),
                ("SIMDGROUPS", SIMDGROUPS),
                ("ROWS", ROWS),
                ("MAX_COLUMNS", MAX_COLUMNS),
            ],
            grid=(n_choices * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=shapes,
            output_dtypes=types[: len(shapes)],
        )
