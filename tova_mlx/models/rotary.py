"""How each layer of a model rotates its keys, found by looking at what it stores.

A model is given the same tokens, one at a time, at two positions. Alone, a token
attends to itself whatever its position, so all that differs in what a layer stores is
the rotation; it is one of those that MLX was asked for meanwhile. That is right for
every model, or it is seen that no rotation explains what is stored.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any
from weakref import finalize

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import cache as mlx_lm_cache

from ..attention.sharing import Shared
from ..caches.refusals import unrotated
from ..errors import OptionError, TovaError, UnsupportedModelError
from ..hooks import dispatcher, replacing
from ..hooks.layers import leaves
from ..policies import Rule
from ..storage.rotation import PERIOD, Renumbering, Rotation

POSITIONS = ("original", "compact", "auto")
# Where keys are looked at a second time: far enough that no two rotations of models
# agree, and within what all of them were trained for.
_FAR = 1001
_TOKENS = 4
# How far keys may be from what a rotation makes of them, in parts of the largest.
_CLOSE = {mx.float32: 1e-3}
_CLOSE_IN_HALF = 3e-2
_lock = RLock()
# By the identity of models, as long as they live.
_known: dict[int, list[Rotation | None]] = {}


def trained_range(model: nn.Module) -> int | None:
    """Return for how many positions a model was trained, scaling included.

    None if its configuration does not say.
    """
    for config in _configs(model):
        said = config.get("max_position_embeddings")
        if not isinstance(said, int):
            continue
        scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
        scaling = scaling if isinstance(scaling, dict) else {}
        factor = scaling.get("factor", 1)
        before = scaling.get("original_max_position_embeddings")
        kind = scaling.get("rope_type") or scaling.get("type")
        if before is not None:
            # Some say the range before scaling in both places.
            return max(said, int(before * factor))
        return int(said * factor) if kind in ("linear", "dynamic") else said
    return None


def _configs(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The configurations of a model, of its text part too."""
    for part in (model, getattr(model, "language_model", None)):
        args = getattr(part, "args", None) or getattr(part, "config", None)
        said = args if isinstance(args, dict) else getattr(args, "__dict__", {})
        yield said
        inner = said.get("text_config")
        yield inner if isinstance(inner, dict) else getattr(inner, "__dict__", {})


def renumbering_for(
    model: nn.Module,
    positions: str,
    rule: Rule,
    caches_of: Callable[[nn.Module], list[Any]],
) -> Renumbering | None:
    """Return when a model's caches renumber, without a layer's rotation; None: never.

    positions: one of POSITIONS; "auto": from where the next one would leave the range
    that the model was trained for, if the model can be renumbered; caches_of: the
    model's own new caches.

    Raises OptionError; UnsupportedModelError for "compact" with a model that cannot.
    """
    if positions not in POSITIONS:
        known = ", ".join(map(repr, POSITIONS))
        raise OptionError(f"positions={positions!r} is not known. Use {known}.")
    if positions == "original" or rule.max_size is None:
        return None
    last = rule.max_size + PERIOD
    try:
        rotations_of(model, caches_of)
        for module in model.modules():
            # Turns faster the further a text goes.
            most = getattr(module, "max_position_embeddings", last)
            if "DynamicNTK" in type(module).__name__ and most < last:
                raise unrotated(
                    type(model).__module__,
                    f"changes its rotation past {most} positions",
                )
    except UnsupportedModelError:
        if positions == "compact":
            raise
        return None
    if positions == "compact":
        return Renumbering()
    trained = trained_range(model)
    if trained is None or _no_range(rule.max_size, trained):
        return None
    return Renumbering(trained - PERIOD + 1)


def _no_range(limit: int | None, trained: int | None) -> str:
    """Why positions cannot be renumbered at the end of a model's range; empty: can."""
    if limit is None:
        return "nothing is evicted"
    if trained is None:
        return "the model does not say for how many it was trained"
    if limit + PERIOD > trained:
        return f"within {trained:,} there is no room for {limit:,} tokens"
    return ""


def said_of(model: nn.Module, positions: str, caches: list[Any]) -> str:
    """Say which positions the caches of a model have, and why.

    positions: what was asked for.
    """
    ours = [c.options for c in leaves(caches) if hasattr(c, "options")]
    when = next((o.renumbering for o in ours if o.renumbering is not None), None)
    if when is not None or positions == "original" or not ours:
        return str(when or "original")
    if ours[0].recall:
        return "original: what is recalled comes back to where it was"
    why = _no_range(ours[0].rule.max_size, trained_range(model))
    return f"original: {why}" if why else "original: this model's cannot be renumbered"


def rotations_of(
    model: nn.Module, caches_of: Callable[[nn.Module], list[Any]]
) -> list[Rotation | None]:
    """Return how each cache's keys are rotated; None: not at all, or not one of ours.

    caches_of: the model's own new caches. Found once per model. Raises
    UnsupportedModelError.
    """
    if id(model) not in _known:
        found = _look(model, caches_of)
        _known[id(model)] = found
        finalize(model, _known.pop, id(model), None)
    return _known[id(model)]


class _Probe(mlx_lm_cache.KVCache):
    """mlx-lm's cache, of a layer that has seen `offset` tokens and holds none."""

    given: tuple[Any, Any] | None = None
    attended = 0

    def update_and_fetch(self, keys: Any, values: Any) -> tuple[Any, Any]:
        self.given = (keys, values)
        self._watched = _Watched(self)
        self.offset += keys.shape[2]
        return self._watched.give((keys, values))

    def attend(
        self, queries: Any, keys: Any, values: Any, *, scale: float, **how: Any
    ) -> Any:
        self.attended += 1
        if self.given is None or not _same(keys, self.given[0]):
            raise _Unlike("attends to other keys than it stores")
        theirs = replacing.original(dispatcher.dispatch)
        return theirs(queries, keys, values, None, scale, **how)

    def make_mask(self, *_: Any, **__: Any) -> None:
        return None


class _Watched(Shared):
    """What a probe gave; another layer that attends to it is noticed."""

    def __init__(self, owner: _Probe):
        super().__init__(shares=True)
        self._owner = owner

    def attend(self, *args: Any, **how: Any) -> Any:
        return self._owner.attend(*args, **how)


class _Unlike(Exception):
    """A model does what a cache that renumbers cannot follow."""


def _look(
    model: nn.Module, caches_of: Callable[[nn.Module], list[Any]]
) -> list[Rotation | None]:
    name = type(model).__module__
    calls: list[Rotation] = []
    try:
        near, far = (_stored(model, caches_of(model), n, calls) for n in (0, _FAR))
        # Several tokens at once may be attended to in another way than one.
        _stored(model, caches_of(model), 0, [], at_once=True)
    except TovaError:
        raise
    except Exception as error:
        why = f"does more with its keys than to rotate and attend to them ({error})"
        raise unrotated(name, str(error) if type(error) is _Unlike else why) from error
    found: list[Rotation | None] = []
    for before, after in zip(near, far, strict=True):
        if not before:
            found.append(None)
            continue
        close = _CLOSE.get(after[0].dtype, _CLOSE_IN_HALF)
        if not all(_apart(*pair) <= close for pair in _others(before, after)):
            raise unrotated(name, "stores more than keys that depends on positions")
        error, rotation = min(_errors(before[0], after[0], calls), key=lambda e: e[0])
        if error > close:
            raise unrotated(name, "does more with its keys than to rotate them")
        found.append(rotation)
    return found


def _errors(
    before: mx.array, after: mx.array, calls: list[Rotation]
) -> Iterator[tuple[float, Rotation | None]]:
    """How far keys are from those before under each rotation, and under none."""
    yield _apart(before, after), None
    start, stop = (mx.array([[[n]]], mx.int32) for n in (0, _FAR))
    for rotation in dict.fromkeys(calls):
        if rotation.dims <= before.shape[3]:
            keys = rotation.rotated(before.astype(mx.float32), start, stop)
            yield _apart(keys, after), rotation


def _stored(
    model: nn.Module,
    caches: list[Any],
    offset: int,
    calls: list[Rotation],
    *,
    at_once: bool = False,
) -> list[list[mx.array]]:
    """What each layer stores of the tokens at a position, keys first.

    at_once: of the tokens one after the other instead.
    """
    parts = list(leaves(caches))
    for cache in parts:
        if type(cache) is mlx_lm_cache.KVCache:
            cache.__class__, cache.offset = _Probe, offset
    tokens = mx.random.randint(0, 100, (_TOKENS, 1), key=mx.random.key(0))
    dispatcher.install()
    with _lock, _watched(calls.append):
        model(tokens.reshape(1, -1) if at_once else tokens, cache=caches)
    if any(isinstance(c, _Probe) and c.attended > 1 for c in parts):
        raise _Unlike("has layers that attend to the keys of others")
    return [_entries(c) for c in parts]


@contextmanager
def _watched(callback: Callable[[Rotation], None]) -> Iterator[None]:
    """Tell of every rotation that MLX is asked for."""
    theirs = mx.fast.rope
    known: dict[int, tuple[float, ...]] = {}

    def rope(a: Any, dims: int, **how: Any) -> Any:
        freqs = how.get("freqs")
        if freqs is not None:
            if id(freqs) not in known:
                known[id(freqs)] = tuple(np.array(freqs, np.float32).tolist())
            freqs = known[id(freqs)]
        base = how["base"] if freqs is None else None
        rotation = Rotation(dims, how["traditional"], base, how["scale"], freqs)
        callback(rotation)
        return theirs(a, dims, **how)

    mx.fast.rope = rope
    try:
        yield
    finally:
        mx.fast.rope = theirs


def _entries(cache: Any) -> list[mx.array]:
    """Keys and values; or a key of no width, and the state that a layer has instead."""
    if isinstance(cache, _Probe):
        return list(cache.given or ())
    if not isinstance(cache, mlx_lm_cache.ArraysCache):
        return []
    leaves_of: Any = tree_flatten(cache.state)
    state = [a for _, a in leaves_of if isinstance(a, mx.array)]
    return [mx.zeros((1, 1, 1, 0)), *state]


def _others(before: list[mx.array], after: list[mx.array]) -> Iterator[Any]:
    """Pairs of what is stored beside keys."""
    return zip(before[1:], after[1:], strict=True)


def _same(a: mx.array, b: mx.array) -> bool:
    """Whether entries are the same, but for their type."""
    if a is b:
        return True
    return a.shape == b.shape and _apart(a, b) == 0


def _apart(a: mx.array, b: mx.array) -> float:
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    if not a.size:
        return 0.0
    return float(mx.abs(a - b).max() / mx.maximum(mx.abs(a).max(), 1e-9))
