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

from ..attention.sharing import given_with

_NAME = "scaled_dot_product_attention"
_original = mlx_lm_base.scaled_dot_product_attention


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
    owner = given_with(keys) if cache is None else cache
    attend = getattr(owner, "attend", None)
    if attend is None:
        return _original(queries, keys, values, cache, scale, mask, sinks)
    return attend(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


def install() -> None:
    """Route attention through `dispatch` in every module that holds mlx-lm's own."""
    if mlx_lm_base.scaled_dot_product_attention is not dispatch:
        _replace(_original, dispatch)


def uninstall() -> None:
    """Put mlx-lm's own function back everywhere."""
    _replace(dispatch, _original)


def is_seen(module_name: str) -> bool:
    """Whether the module attends through the function that `install` replaces."""
    held = vars(sys.modules[module_name]).get(_NAME)
    return held is dispatch or held is _original


def _replace(old: Any, new: Any) -> None:
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(_NAME) is old:
            setattr(module, _NAME, new)
