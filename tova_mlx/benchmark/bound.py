"""The least time of a decode step: its bytes moved, by the memory's bandwidth.

Every weight that a token uses is read once, and so is what its query attends to.
"""

import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

# More than any cache of a processor holds.
_BYTES = 2**29
_REPEATS = 6


def milliseconds(nbytes: int, bandwidth: float) -> float:
    """The time that so many bytes take; bandwidth: bytes per second."""
    return 1e3 * nbytes / bandwidth


def bandwidth() -> float:
    """Measure bytes read per second: one vector times 512 MiB of weights.

    That is what a decode step does most. The fastest of several; also of their sum.
    """
    dtype = mx.float16 if mx.metal.is_available() else mx.float32
    width = 8192
    weights = mx.ones((_BYTES // (width * dtype.size), width), dtype=dtype)
    vector = mx.ones((1, width), dtype=dtype)
    mx.eval(weights, vector)
    times = []
    for i in range(2 * _REPEATS):
        begun = time.perf_counter()
        mx.eval(weights.sum() if i % 2 else vector @ weights.T)
        times.append(time.perf_counter() - begun)
    nbytes = weights.nbytes
    del weights
    mx.clear_cache()
    return nbytes / min(times)


def weights_read(model: nn.Module) -> int:
    """Return the bytes of a model's weights that a decode step reads.

    Of a table of embeddings that is not the output's too, no more than a row; of
    experts, as many as are chosen for a token, if the model says how many.
    """
    total = 0
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for _, module in model.named_modules():
        own: Any = tree_flatten(
            {k: v for k, v in module.items() if isinstance(v, mx.array)}
        )
        nbytes = sum(a.nbytes for _, a in own)
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)):
            nbytes = 0 if "lm_head" in names else nbytes
        if isinstance(module, (SwitchLinear, QuantizedSwitchLinear)):
            experts = module["weight"].shape[0]
            chosen = getattr(getattr(model, "args", None), "num_experts_per_tok", None)
            nbytes = nbytes * min(chosen or experts, experts) // experts
        total += nbytes
    return total
