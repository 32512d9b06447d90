"""Whether a model can read several prompts of unequal length at once."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from .conversion import default_caches

# More than any model has KV heads, and a multiple of none.
_MANY = 97


def takes_rows(model: nn.Module) -> bool:
    """Whether a model, with the caches that it has, keeps the rows of a batch apart.

    Some of mlx-lm's do not: gemma2 and phi3small line the rows of a mask up with KV
    heads, so that one conversation reads by another's mask where there are as many;
    gpt_bigcode takes one position for all. Graphs are built, not evaluated.
    """
    try:
        # So many bounded caches would take seconds.
        _read([default_caches(model) for _ in range(_MANY)], model)
        _read([make_prompt_cache(model) for _ in range(2)], model)
    except Exception:
        # Whatever it is, it would end the thread that answers requests.
        return False
    return True


def _read(rows: list[list[Any]], model: nn.Module) -> None:
    """Read two tokens a row, of the last row one."""
    caches = [layer[0].merge(list(layer)) for layer in zip(*rows, strict=True)]
    lengths = [2] * (len(rows) - 1) + [1]
    for cache in caches:
        cache.prepare(lengths=lengths, right_padding=[2 - n for n in lengths])
    model(mx.zeros((len(rows), 2), mx.int32), cache=caches)
