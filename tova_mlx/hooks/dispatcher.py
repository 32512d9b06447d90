"""Hands each of our caches the queries that a model attends with.

mlx-lm's models call one function with the cache in hand. `install` puts a stateless
dispatcher in its place wherever it was imported; caches with an `attend` method
answer through it, all others go on to mlx-lm's own function. Nothing happens at
import: a cache installs it when it is made.
"""

import sys
from typing import Any

import mlx.core as mx
import mlx_lm.models.base as mlx_lm_base

from ..attention.sharing import shared_with
from . import replacing

_NAME = "scaled_dot_product_attention"


@replacing.stands_for(mlx_lm_base, _NAME)
def dispatch(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> mx.array:
    """mlx-lm's attention function, but a cache with `attend` answers itself."""
    # A layer without a cache may share the keys of one with ours.
    owner = shared_with(keys) if cache is None else cache
    attend = getattr(owner, "attend", None)
    if attend is None:
        theirs = replacing.original(dispatch)
        return theirs(queries, keys, values, cache, scale, mask, sinks)
    return attend(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


def install() -> None:
    """Route attention through `dispatch` in every module that holds mlx-lm's own."""
    if getattr(mlx_lm_base, _NAME) is not dispatch:
        replacing.replace(mlx_lm_base, _NAME, dispatch)


def uninstall() -> None:
    """Put mlx-lm's own function back everywhere."""
    replacing.put_back(mlx_lm_base, _NAME)


def is_seen(module_name: str) -> bool:
    """Whether the module attends through the function that `install` replaces."""
    there = vars(sys.modules[module_name]).get(_NAME)
    theirs = replacing.original(getattr(mlx_lm_base, _NAME))
    return there is not None and replacing.is_same(there, theirs)
