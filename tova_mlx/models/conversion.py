"""Bounded caches for a model's layers, for one call or for all of mlx-lm's tools.

Only plain `KVCache` layers are replaced: what a model already bounds itself (sliding
windows, state-space layers) is left alone.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from weakref import ref

import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache

from ..caches.layer import PolicyKVCache
from ..caches.lockstep import keep_together
from ..caches.options import JOURNAL, ArchiveOptions, CacheOptions
from ..caches.refusals import unseen
from ..caches.tova import new_cache
from ..errors import TovaError, UnsupportedModelError
from ..hooks import dispatcher
from ..hooks.layers import leaves, total
from ..storage.entries import dequantized
from ..storage.formats import Storage
from .archives import archive_on_disk
from .budget import STEP, Budget, Fit, fit, parse_size
from .fitting import fitted
from .known import REFUSED
from .report import Report, bound, describe, trace, unbounded_bytes
from .rotary import renumbering_for, rotations_of

# What a model bounds itself.
_BOUNDED = (mlx_lm_cache.ArraysCache, mlx_lm_cache.RotatingKVCache)


def make_prompt_cache(
    model: nn.Module,
    max_kv_size: int | str | None,
    *,
    policy: str = "tova",
    prefill: str = "stepwise",
    journal: int = JOURNAL,
    kv_bits: int | tuple[int, int] | None = None,
    kv_group_size: int = 64,
    positions: str = "original",
    recall: int = 0,
    archive: ArchiveOptions | str | None = None,
    **options: Any,
) -> list[Any]:
    """One cache per layer of an mlx-lm model, for `prompt_cache=`.

    Args:
        model: a model that `mlx_lm.load` gave.
        max_kv_size: tokens kept per layer; the policy `full` does not read it. Or bytes
            that all layers' caches together may take, such as "2GB" or "512MiB", or
            "auto", what the device can spare: `describe` says how many tokens that is.
        policy: a name in `POLICIES`.
        prefill: "stepwise" or "once", see PolicyKVCache.
        journal: newest tokens that can be taken back, see PolicyKVCache.
        kv_bits, kv_group_size: quantised keys and values, see PolicyKVCache.
        positions: "original": a token keeps the position at which it was read, as in
            the paper; "compact": the tokens held are renumbered every 256 tokens, so
            that positions stay below max_kv_size + 256; "auto": compact from where the
            next position would leave the range that the model was trained for.
        recall: how many of `max_kv_size` slots hold what was evicted last, on its way
            to an archive that is attended to, see PolicyKVCache; with original
            positions only, which "auto" then means.
        archive: a directory, or `ArchiveOptions`, for what is evicted, read with
            recall; None: in memory, which then grows. Deleted when the caches are.
        options: the policy's own options.

    Raises:
        OptionError: a value that cannot work, or an option the policy does not read.
        UnsupportedModelError: the model attends where we cannot see its queries, or
            does with its caches what a bounded one cannot be right with; or, with
            compact positions, does more with its keys than to rotate them.
    """
    made = _resolved(
        model,
        max_kv_size,
        1,
        policy=policy,
        prefill=prefill,
        journal=journal,
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
        positions=positions,
        recall=recall,
        archive=archive,
        **options,
    )
    return _checked(model, made)


def _checked(model: nn.Module, made: CacheOptions) -> list[Any]:
    """New caches for a model that they can be right with.

    Raises UnsupportedModelError, OptionError.
    """
    caches = _bounded(model, made)
    _check_model(model, made, list(leaves(caches)))
    if made.storage.is_plain and not made.recall:
        return caches
    _check_quantised(model, caches)
    if made.archived is not None:
        for cache in leaves(caches):
            if isinstance(cache, PolicyKVCache) and not cache.empty():
                # Raises OptionError for rows that cannot be archived so.
                made.archived.store(*map(dequantized, cache.slots.held_entries()))
    return _fitted(model, made)


def _fitted(model: nn.Module, made: CacheOptions) -> list[Any]:
    """New caches, unchecked, whose formats are fitted to the model."""
    storages = fitted(model, made.storage, default_caches)
    archived: Sequence[Any] = ()
    if made.archived is not None:
        archived = fitted(model, made.archived, default_caches)
    caches = _bounded(model, made, storages, archived)
    if made.archive is not None:
        archive_on_disk(caches, made.archive)
    return caches


def tokens_within(
    model: nn.Module,
    budget: Budget,
    *,
    parts: int = 1,
    each: str = "conversations",
    step: int = STEP,
    **options: Any,
) -> Fit:
    """How many tokens per layer fit in a budget.

    Args:
        model: a model that `mlx_lm.load` gave.
        budget: as `parse_size` gives it.
        parts: how many sets of caches share the budget, and what each is, in words.
        step: tokens of a prompt that are read at once.
        options: as in `make_prompt_cache`.

    Raises:
        OptionError: too small for the policy, or a policy without a limit.
    """

    # What is on disk is not part of it.
    made_for = partial(_made, model, **{**options, "archive": None})
    most = partial(_most_bytes, model)
    return fit(model, budget, made_for, most, parts=parts, each=each, step=step)


def bytes_at_most(model: nn.Module, max_kv_size: int, **options: Any) -> int | None:
    """Return the bytes that all caches of a model can reach; None: without limit.

    options: as in `make_prompt_cache`. Raises OptionError.
    """
    return _most_bytes(model, _made(model, max_kv_size, **options))


def _most_bytes(model: nn.Module, made: CacheOptions) -> int | None:
    return total(bound(c) for c in trace(model, _checked(model, made)))


def _resolved(
    model: nn.Module, max_kv_size: int | str | None, rows: int, **options: Any
) -> CacheOptions:
    size = parse_size(max_kv_size)
    if isinstance(size, Budget):
        size = tokens_within(model, size, parts=rows, **options).tokens
    return _made(model, size, **options)


def _made(
    model: nn.Module, tokens: int | None, *, positions: str = "original", **options: Any
) -> CacheOptions:
    """The options of a cache of so many tokens."""
    if isinstance(archive := options.get("archive"), (str, os.PathLike)):
        options["archive"] = ArchiveOptions(os.fspath(archive))
    made = CacheOptions.resolve(tokens, **options)
    if positions == "auto" and (made.prefill == "once" or made.recall):
        return made
    when = renumbering_for(model, positions, made.rule, default_caches)
    return made if when is None else replace(made, renumbering=when)


def convert(
    model: nn.Module, max_kv_size: int | str | None, *, rows: int = 1, **options: Any
) -> Report:
    """Make mlx-lm's tools use bounded caches with this model.

    They ask `model.make_cache` for caches; this sets it. `revert` undoes it, a second
    `convert` replaces the first.

    Args:
        model: a model that `mlx_lm.load` gave.
        max_kv_size, options: as in `make_prompt_cache`.
        rows: how many conversations share a limit in bytes: the rows of a batch.

    Returns:
        What each layer got, and the bytes that it can reach.

    Raises:
        OptionError, UnsupportedModelError: as in `make_prompt_cache`; the model is
            left as it was.
    """
    made = _resolved(model, max_kv_size, rows, **options)
    _checked(model, made)
    model.make_cache = _Maker(model, made)
    return describe(model)


def revert(model: nn.Module) -> None:
    """Give a converted model its own caches back; others are left alone."""
    maker = vars(model).get("make_cache")
    if isinstance(maker, _Maker):
        del model.make_cache
        if maker.shadowed is not None:
            model.make_cache = maker.shadowed


def pin_tokens(caches: Iterable[Any], n: int) -> int:
    """Protect the first n tokens of new caches; return how many in the end.

    It is at most half of what a layer keeps; 0 if nothing is bounded.
    """
    ours = [c for c in leaves(caches) if isinstance(c, PolicyKVCache)] if n else []
    for cache in ours:
        cache.pin(n)
    return max((c.rule.pinned for c in ours), default=0)


def pin_in_new_caches(model: nn.Module, n: int) -> None:
    """Let the caches that a converted model makes from now on pin their first n."""
    maker = vars(model).get("make_cache")
    if isinstance(maker, _Maker):
        maker.pinned = n


def archive_as_converted(model: nn.Module, caches: list[Any]) -> None:
    """Let loaded caches archive where those do that a converted model makes.

    Raises OptionError: the directory cannot be used.
    """
    maker = vars(model).get("make_cache")
    if isinstance(maker, _Maker) and maker.made.archive is not None:
        archive_on_disk(caches, maker.made.archive)


class _Maker:
    """The `make_cache` of a converted model.

    `shadowed` is what the model itself (not its class) had in its place. The model is
    not held on to: it holds this.
    """

    def __init__(self, model: nn.Module, made: CacheOptions):
        before = vars(model).get("make_cache")
        self.shadowed = before.shadowed if isinstance(before, _Maker) else before
        self.made = made
        # First tokens that new caches pin, until it is set again.
        self.pinned = 0
        self._model = ref(model)

    def __call__(self) -> list[Any]:
        model = self._model()
        assert model is not None
        # What `convert` has checked is not checked for every request.
        caches = _fitted(model, self.made)
        pin_tokens(caches, self.pinned)
        return caches

    def __deepcopy__(self, memo: Any) -> "_Maker":
        # Of a model that is copied: it makes caches for the copy.
        model = self._model()
        twin = object.__new__(_Maker)
        twin.shadowed, twin.made = self.shadowed, self.made
        twin.pinned = self.pinned
        twin._model = ref(memo.get(id(model), model))
        return twin


def default_bytes(model: nn.Module, tokens: int) -> int:
    """Bytes that the model's caches take without us, after so many tokens."""
    return unbounded_bytes(trace(model, default_caches(model)), tokens)


def default_caches(model: nn.Module) -> list[Any]:
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
    model: nn.Module,
    made: CacheOptions,
    storages: Sequence[Storage] = (),
    archived: Sequence[Storage] = (),
) -> list[Any]:
    """New caches, unchecked; those of layers that share keys know it.

    storages, archived: of all caches, those in lists one by one, where they differ
    from `made`'s.
    """
    fitted_to, archived_as = iter(storages), iter(archived)
    rotations: Iterator[Any] = iter(())
    if made.renumbering is not None:
        rotations = iter(rotations_of(model, default_caches))

    def bounded(cache: Any) -> Any:
        if type(cache) is mlx_lm_cache.CacheList:
            return mlx_lm_cache.CacheList(*map(bounded, cache.caches))
        storage, rotation = next(fitted_to, made.storage), next(rotations, None)
        kept_as = next(archived_as, made.archived)
        if type(cache) is not mlx_lm_cache.KVCache:
            return cache
        own = replace(made, storage=storage, archived=kept_as)
        if own.renumbering is not None:
            when = replace(own.renumbering, rotation=rotation)
            own = replace(own, renumbering=when)
        return new_cache(own)

    caches = [bounded(c) for c in default_caches(model)]
    layers: Any = model.layers
    if len(layers) > len(caches) and made.renumbering is None:
        for cache in leaves(caches):
            if isinstance(cache, PolicyKVCache):
                cache.share()
    keep_together(caches)
    return caches


def _check_quantised(model: nn.Module, caches: list[Any]) -> None:
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


def _check_model(model: nn.Module, made: CacheOptions, caches: list[Any]) -> None:
    """Refuse a model, of which these are the new caches, that `made` is wrong for."""
    rule = made.rule
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
    layers: Any = model.layers
    if made.recall and len(layers) > len(caches):
        raise UnsupportedModelError(
            f"{type(model).__module__} has layers that share keys and values, so what "
            "was evicted cannot be brought back for each. Use recall=0, or another "
            "model."
        )
    if not any(isinstance(c, PolicyKVCache) for c in caches):
        raise UnsupportedModelError(
            f"{type(model).__module__} has caches of its own kind, which {rule.policy} "
            "cannot bound. Use policy full, or another model."
        )
    if rule.by_age and made.renumbering is None and not made.recall:
        return
    if not any(dispatcher.is_seen(n) for n in names if n in sys.modules):
        raise unseen(type(model).__module__, rule.policy)
