"""Whether what is written for Metal runs, or its portable form.

Metal's is taken where MLX uses Metal. `TOVA_MLX_KERNELS=off` in the environment keeps
to the portable form; `on` takes Metal's wherever it is, for tests.
"""

import os

import mlx.core as mx


def kernels_wanted() -> bool:
    """Whether evictions and copies run as Metal kernels."""
    setting = os.environ.get("TOVA_MLX_KERNELS")
    if setting in ("on", "off"):
        return setting == "on"
    return mx.metal.is_available() and on_gpu()


def on_gpu() -> bool:
    """Whether MLX computes on a GPU. Some of what is fast there is slow on its CPU."""
    return mx.default_device() == mx.Device(mx.gpu)
