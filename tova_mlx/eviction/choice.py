"""Whether the scan of a block runs as Metal kernels or in its portable form."""

from typing import Any

import mlx.core as mx

from ..policies import Rule
from ..storage.device import kernels_wanted
from .scan import Columns, ScanResult, scan_on_cpu
from .scan_kernels import MAX_COLUMNS, scan_on_gpu


def scan_block(
    logits: mx.array,
    columns: Columns,
    rule: Rule,
    *,
    limit: int | None,
    n_before: int = 0,
    sinks: mx.array | None = None,
    at_eviction: bool = False,
) -> ScanResult:
    """The prefill scan; arguments as in `scan_on_cpu`."""
    how: dict[str, Any] = {"limit": limit, "n_before": n_before, "sinks": sinks}
    if at_eviction:
        # The kernel does not say them.
        return scan_on_cpu(logits, columns, rule, at_eviction=True, **how)
    on_gpu = kernels_wanted() and logits.shape[3] <= MAX_COLUMNS
    scan = scan_on_gpu if on_gpu else scan_on_cpu
    return scan(logits, columns, rule, **how)
