"""Bounded caches for a model's layers, for one call or for all of mlx-lm's tools.

Only plain `KVCache` layers are replaced: what a model already bounds itself (sliding
windows, state-space layers) is left alone.
"""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache

from . import attention
from .cache import JOURNAL, PolicyKVCache, TOVACache
from .errors import UnsupportedModelError
from .policies import settle
from .report import Report, describe


def make_prompt_cache(
    model: nn.Module,
    max_kv_size: int | None,
    *,
    policy: str = "tova",
    prefill: str = "stepwise",
    journal: int = JOURNAL,
    **options: Any,
) -> list[Any]:
    """One cache per layer of an mlx-lm model, for `prompt_cache=`.

    Args:
        model: a model that `mlx_lm.load` gave.
        max_kv_size: tokens kept per layer; the policy `full` does not read it.
        policy: a name in `POLICIES`.
        prefill: "stepwise" or "once", see PolicyKVCache.
        journal: newest tokens that can be taken back, see PolicyKVCache.
        options: the policy's own options.

    Raises:
        OptionError: a value that cannot work, or an option the policy does not read.
        UnsupportedModelError: the model attends where we cannot see its queries, or
            has no layer that could be bounded.
    """
    settle(policy, max_kv_size, options)
    common: dict[str, Any] = {"prefill": prefill, "journal": journal}

    def make() -> PolicyKVCache:
        if policy == "tova":
            assert max_kv_size is not None
            return TOVACache(max_kv_size, **common, **options)
        return PolicyKVCache(max_kv_size, policy, **common, **options)

    caches = [
        make() if type(c) is mlx_lm_cache.KVCache else c for c in _default_caches(model)
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


def convert(model: nn.Module, max_kv_size: int | None, **options: Any) -> Report:
    """Make mlx-lm's tools use bounded caches with this model.

    They ask `model.make_cache` for caches; this sets it. `revert` undoes it, a second
    `convert` replaces the first.

    Args:
        model: a model that `mlx_lm.load` gave.
        max_kv_size, options: as in `make_prompt_cache`.

    Returns:
        What each layer got, and the bytes that it can reach.

    Raises:
        OptionError, UnsupportedModelError: as in `make_prompt_cache`; the model is
            left as it was.
    """
    make_prompt_cache(model, max_kv_size, **options)
    maker = _Maker(model, max_kv_size, options)
    model.make_cache = maker
    return describe(model)


def revert(model: nn.Module) -> None:
    """Give a converted model its own caches back; others are left alone."""
    maker = vars(model).get("make_cache")
    if isinstance(maker, _Maker):
        del model.make_cache
        if maker.shadowed is not None:
            model.make_cache = maker.shadowed


class _Maker:
    """The `make_cache` of a converted model.

    `shadowed` is what the model itself (not its class) had in its place.
    """

    def __init__(
        self, model: nn.Module, max_kv_size: int | None, options: dict[str, Any]
    ):
        before = vars(model).get("make_cache")
        self.shadowed = before.shadowed if isinstance(before, _Maker) else before
        self.model, self.max_kv_size, self.options = model, max_kv_size, options

    def __call__(self) -> list[Any]:
        return make_prompt_cache(self.model, self.max_kv_size, **self.options)


def _default_caches(model: nn.Module) -> list[Any]:
    """The caches that the model has without us."""
    maker: Callable[[], list[Any]] | None = getattr(model, "make_cache", None)
    if isinstance(maker, _Maker):
        method = getattr(type(model), "make_cache", None)
        maker = maker.shadowed or (method and method.__get__(model))
    default = SimpleNamespace(layers=model.layers)
    if maker is not None:
        default.make_cache = maker
    return mlx_lm_cache.make_prompt_cache(default)  # type: ignore[arg-type]


def _check_seen(model: nn.Module, policy: str) -> None:
    """Refuse a model none of whose modules attend through mlx-lm's function."""
    modules = {type(m).__module__ for m in model.modules()}
    if not any(attention.is_seen(m) for m in modules if m in sys.modules):
        raise UnsupportedModelError(
            f"{type(model).__module__} computes its own attention, so {policy} cannot "
            "see its queries. Use policy window or streaming, or another model."
        )
