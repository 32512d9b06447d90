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

from ..caches.layer import JOURNAL, PolicyKVCache, TOVACache
from ..caches.lockstep import keep_together
from ..caches.refusals import unseen
from ..errors import TovaError, UnsupportedModelError
from ..hooks import dispatcher as attention
from ..hooks.layers import leaves
from ..policies import Rule, settle
from .report import Report, describe, trace

# Model files that no bounded cache can be right with, and why.
REFUSED = {
    "afm7": "places the queries of shared layers by the number of tokens held, which "
    "is not the number seen",
    "deepseek_v32": "chooses by slot what to attend to in two caches at once",
    "glm_moe_dsa": "chooses by slot what to attend to in two caches at once",
    "minimax_m3_vl": "chooses blocks of slots to attend to, by their number",
    "phi3small": "places blocks of slots by their number",
    "iquestloopcoder": "attends to a cache of the loop before, with that of another",
    "muse_spark": "runs on Metal only, so bounded caches were never tried with it",
}

# What a model bounds itself.
_BOUNDED = (mlx_lm_cache.ArraysCache, mlx_lm_cache.RotatingKVCache)


def make_prompt_cache(
    model: nn.Module,
    max_kv_size: int | None,
    *,
    policy: str = "tova",
    prefill: str = "stepwise",
    journal: int = JOURNAL,
    kv_bits: int | tuple[int, int] | None = None,
    kv_group_size: int = 64,
    **options: Any,
) -> list[Any]:
    """One cache per layer of an mlx-lm model, for `prompt_cache=`.

    Args:
        model: a model that `mlx_lm.load` gave.
        max_kv_size: tokens kept per layer; the policy `full` does not read it.
        policy: a name in `POLICIES`.
        prefill: "stepwise" or "once", see PolicyKVCache.
        journal: newest tokens that can be taken back, see PolicyKVCache.
        kv_bits, kv_group_size: quantised keys and values, see PolicyKVCache.
        options: the policy's own options.

    Raises:
        OptionError: a value that cannot work, or an option the policy does not read.
        UnsupportedModelError: the model attends where we cannot see its queries, or
            does with its caches what a bounded one cannot be right with.
    """
    rule = settle(policy, max_kv_size, options)
    arguments: dict[str, Any] = {
        "policy": policy,
        "prefill": prefill,
        "journal": journal,
        "kv_bits": kv_bits,
        "kv_group_size": kv_group_size,
        **options,
    }
    caches = _bounded(model, max_kv_size, **arguments)
    _check_model(model, rule, list(leaves(caches)))
    if kv_bits is not None:
        _check_packed(model, _bounded(model, max_kv_size, **arguments))
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
        # What `convert` has checked is not checked for every request.
        return _bounded(self.model, self.max_kv_size, **self.options)


def _default_caches(model: nn.Module) -> list[Any]:
    """The caches that the model has without us."""
    maker: Callable[[], list[Any]] | None = getattr(model, "make_cache", None)
    if isinstance(maker, _Maker):
        method = getattr(type(model), "make_cache", None)
        maker = maker.shadowed or (method and method.__get__(model))
    # Some models with pictures forget to pass on what their language model makes.
    language_model: Any = getattr(model, "language_model", None)
    maker = maker or getattr(language_model, "make_cache", None)
    default = SimpleNamespace(layers=model.layers)
    if maker is not None:
        default.make_cache = maker
    return mlx_lm_cache.make_prompt_cache(default)  # type: ignore[arg-type]


def _bounded(
    model: nn.Module, max_kv_size: int | None, *, policy: str = "tova", **arguments: Any
) -> list[Any]:
    """New caches, unchecked; those of layers that share keys know it."""

    def make() -> PolicyKVCache:
        if policy == "tova":
            assert max_kv_size is not None
            return TOVACache(max_kv_size, **arguments)
        return PolicyKVCache(max_kv_size, policy, **arguments)

    def bounded(cache: Any) -> Any:
        if type(cache) is mlx_lm_cache.CacheList:
            return mlx_lm_cache.CacheList(*map(bounded, cache.caches))
        return make() if type(cache) is mlx_lm_cache.KVCache else cache

    caches = [bounded(c) for c in _default_caches(model)]
    layers: Any = model.layers
    if len(layers) > len(caches):
        for cache in leaves(caches):
            if isinstance(cache, PolicyKVCache):
                cache.share()
    keep_together(caches)
    return caches


def _check_packed(model: nn.Module, caches: list[Any]) -> None:
    """Refuse a model that does more with its keys than to attend to them.

    caches: to be thrown away.
    """
    try:
        trace(model, caches)
    except TovaError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__module__} does more with its keys and values than attend "
            f"to them, so they cannot be quantised ({error}). Leave kv_bits out."
        ) from error


def _check_model(model: nn.Module, rule: Rule, caches: list[Any]) -> None:
    """Refuse a model, of which these are the new caches, that `rule` is wrong for."""
    if rule.max_size is None:
        return
    names = {type(m).__module__ for m in model.modules()}
    for name in sorted(names):
        reason = REFUSED.get(name.removeprefix("mlx_lm.models."))
        if reason is not None:
            raise UnsupportedModelError(
                f"{name} {reason}. Use policy full, or another model."
            )
    if all(isinstance(c, _BOUNDED) for c in caches):
        return
    if not any(isinstance(c, PolicyKVCache) for c in caches):
        raise UnsupportedModelError(
            f"{type(model).__module__} has caches of its own kind, which {rule.policy} "
            "cannot bound. Use policy full, or another model."
        )
    if rule.by_age:
        return
    if not any(attention.is_seen(n) for n in names if n in sys.modules):
        raise unseen(type(model).__module__, rule.policy)
