"""Whether an eviction runs as a Metal kernel or in its portable form.

The kernels run where MLX uses Metal. `TOVA_MLX_KERNELS=off` in the environment keeps
to the portable form; `on` takes the kernels wherever it is, for tests.
"""

import os
from typing import Any

import mlx.core as mx

from .kernels import MAX_COLUMNS, scan_on_gpu
from .scan import ScanResult, scan_on_cpu


def kernels_wanted() -> bool:
    """Whether evictions run as Metal kernels."""
    setting = os.environ.get("TOVA_MLX_KERNELS")
    if setting in ("on", "off"):
        return setting == "on"
    return mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)


def scan_block(logits: mx.array, *arguments: Any, **options: Any) -> ScanResult:
    """The prefill scan; arguments as in `scan_on_cpu`."""
    on_gpu = kernels_wanted() and logits.shape[3] <= MAX_COLUMNS
    return (scan_on_gpu if on_gpu else scan_on_cpu)(logits, *arguments, **options)
