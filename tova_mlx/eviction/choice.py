"""Whether an eviction runs as a Metal kernel or in its portable form.

The kernels run where MLX uses Metal. `TOVA_MLX_KERNELS=off` in the environment keeps
to the portable form; `on` takes the kernels wherever it is, for tests.
"""

import os
from typing import Any

import mlx.core as mx

from ..policies import Rule
from .scan import Columns, ScanResult, scan_on_cpu
from .scan_kernels import MAX_COLUMNS, scan_on_gpu


def kernels_wanted() -> bool:
    """Whether evictions run as Metal kernels."""
    setting = os.environ.get("TOVA_MLX_KERNELS")
    if setting in ("on", "off"):
        return setting == "on"
    return mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)


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
