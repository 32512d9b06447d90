"""Bounded caches for a model's layers.

Only plain `KVCache` layers are replaced: what a model already bounds itself (sliding
windows, state-space layers) is left alone.
"""

import sys
from typing import Any

import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache

from . import attention
from .cache import PolicyKVCache, TOVACache
from .errors import UnsupportedModelError
from .policies import settle


def make_prompt_cache(
    model: nn.Module,
    max_kv_size: int | None,
    *,
    policy: str = "tova",
    prefill: str = "stepwise",
    **options: Any,
) -> list[Any]:
    """One cache per layer of an mlx-lm model, for `prompt_cache=`.

    Args:
        model: a model that `mlx_lm.load` gave.
        max_kv_size: tokens kept per layer; the policy `full` does not read it.
        policy: a name in `POLICIES`.
        prefill: "stepwise" or "once", see PolicyKVCache.
        options: the policy's own options.

    Raises:
        OptionError: a value that cannot work, or an option the policy does not read.
        UnsupportedModelError: the model attends where we cannot see its queries, or
            has no layer that could be bounded.
    """
    settle(policy, max_kv_size, options)

    def make() -> PolicyKVCache:
        if policy == "tova":
            assert max_kv_size is not None
            return TOVACache(max_kv_size, prefill=prefill, **options)
        return PolicyKVCache(max_kv_size, policy, prefill=prefill, **options)

    caches = [
        make() if type(c) is mlx_lm_cache.KVCache else c
        for c in mlx_lm_cache.make_prompt_cache(model)
    ]
    ours = [c for c in caches if isinstance(c, PolicyKVCache)]
    if not ours:
        raise UnsupportedModelError(
            f"{type(model).__module__} has no layer with a plain KVCache, so "
            f"{policy} has nothing to bound. Use the model's own cache."
        )
    if ours[0].rule.reads_attention:
        _check_seen(model, policy)
    return caches


def _check_seen(model: nn.Module, policy: str) -> None:
    """Refuse a model none of whose modules attend through mlx-lm's function."""
    modules = {type(m).__module__ for m in model.modules()}
    if not any(attention.is_seen(m) for m in modules if m in sys.modules):
        raise UnsupportedModelError(
            f"{type(model).__module__} computes its own attention, so {policy} cannot "
            "see its queries. Use policy window or streaming, or another model."
        )
