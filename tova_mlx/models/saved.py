"""Prompts saved to a file and loaded again, or refused with the reason.

mlx-lm writes and reads the files; its own `save_prompt_cache` and `load_prompt_cache`
work on our caches too once one was made. These add what a file cannot survive without
being noticed: writing half of it, and loading it where it does not belong.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten
from mlx_lm.models import cache as mlx_lm_cache

from ..caches.layer import PolicyKVCache
from ..caches.lockstep import keep_together
from ..caches.tova import TOVACache
from ..errors import CacheStateError, reason_of
from ..files import written_whole
from ..hooks import registration
from ..hooks.layers import leaves
from ..storage.entries import arrays_of
from . import tensor_file
from .own_caches import check_own
from .report import trace

_SUFFIX = ".safetensors"
# Files of earlier versions have another one, which said less, under "tova_mlx_model".
_FINGERPRINT = "tova_mlx_weights"
# mlx-lm's own files have none, nor have those of earlier versions.
_SUM = "tova_mlx_sum"
# Words of 8 bytes in a row of `_sums`, so that two rows of sums stay in a core's
# cache; and rows that are summed before the sums are read.
_WORDS, _ROWS = 8192, 4096
# Entries of all lists in a file: a million are those of thousands of layers.
_LONGEST = 1 << 20
# Parts of a name: those of caches in lists, and of their entries, have a few.
_DEEPEST = 16


def prompt_path(name: str | os.PathLike[str]) -> Path:
    """The file that a prompt is saved to: for `~/talk` it is `…/talk.safetensors`.

    Raises CacheStateError for what can name no file.
    """
    try:
        path = Path(name).expanduser()
        if path.suffix != _SUFFIX:
            path = path.with_name(path.name + _SUFFIX)
    except (RuntimeError, ValueError) as error:
        raise CacheStateError(f"{name}: no name of a file ({error}).") from error
    return path


def save_prompt_cache(
    path: str | os.PathLike[str],
    cache: list[Any],
    *,
    model: nn.Module | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write the caches of a prompt to a `.safetensors` file, all of it or nothing.

    model: the model that read the prompt; its fingerprint goes into the file. Returns
    the file's path, see `prompt_path`.

    Raises CacheStateError if the file cannot be written; what was there stays.
    """
    path = prompt_path(path)
    metadata = {**(metadata or {}), _SUM: tensor_file.UNSUMMED}
    if model is not None:
        metadata[_FINGERPRINT] = fingerprint(model)
    try:
        with written_whole(path) as written:
            here = [_in_memory(c) for c in cache]
            mlx_lm_cache.save_prompt_cache(str(written), here, metadata)
            tensor_file.write_sum(written, _SUM)
    except (OSError, RuntimeError, ValueError) as error:
        raise CacheStateError(
            f"{path}: cannot save the prompt ({error}). Check the directory and the "
            "space on the disk."
        ) from error
    return path


def _in_memory(cache: Any) -> Any:
    """A cache whose archive is in memory, or the cache itself if it is."""
    if hasattr(cache, "caches"):
        return mlx_lm_cache.CacheList(*map(_in_memory, cache.caches))
    if not isinstance(cache, PolicyKVCache) or not cache.archives_on_disk:
        return cache
    twin = PolicyKVCache.of(cache.options, cache.slots.twin(), cache.shares)
    twin.archive_on(None)
    return twin


def load_prompt_cache(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
) -> tuple[list[Any], dict[str, str]]:
    """The caches that a file holds, and its metadata.

    path: as it was given to `save_prompt_cache`, or that of any file.
    model: what will go on with them; if given, the caches must be like the ones that
    it makes (`convert`) and, if the file has a fingerprint, be of this very model.

    Raises CacheStateError: the file is missing, cut off or no prompt, or does not fit.
    """
    path = _there(path)
    registration.install(PolicyKVCache, TOVACache)
    try:
        with ExitStack() as until_read:
            caches, metadata = _read(_readable(path, until_read))
            mx.eval([c.state for c in caches])
    except CacheStateError as error:
        raise CacheStateError(f"{path}: {error}") from error
    except Exception as error:
        # Anything may come out of a damaged file.
        raise CacheStateError(
            f"{path}: not a whole saved prompt ({reason_of(error)}). Save it again."
        ) from error
    if model is not None:
        _check_fits(path, caches, metadata, model)
    keep_together(caches)
    return caches, metadata


def fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes, types and numbers of all parameters.

    Sees every change of one number and tells a model from its fine-tunes. It is no
    protection from somebody who looks for two models with the same.
    """
    digest = hashlib.sha256()
    named: Any = tree_flatten(model.parameters())
    for name, array in sorted(named, key=lambda pair: pair[0]):
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        # No copy, unless they are not in a row in memory.
        raw = mx.contiguous(array.reshape(-1)).view(mx.uint8)
        numbers = np.array(raw, copy=False)
        whole = len(numbers) // (8 * _WORDS) * (8 * _WORDS)
        rows = numbers[:whole].view(np.uint64).reshape(-1, _WORDS)
        for start in range(0, len(rows), _ROWS):
            digest.update(_sums(rows[start : start + _ROWS]).data)
        digest.update(numbers[whole:].data)
    return digest.hexdigest()[:32]


def _sums(rows: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Fletcher's two sums of every column, modulo 2^64: the second knows the order.

    Several times as fast as sha256, and as reading a model.
    """
    sums = np.zeros((2, rows.shape[1]), np.uint64)
    once, twice = sums
    for row in rows:
        np.add(once, row, out=once)
        np.add(twice, once, out=twice)
    return sums


def _there(name: str | os.PathLike[str]) -> Path:
    """The file of a prompt of this name. Raises CacheStateError."""
    path = prompt_path(name)
    if os.path.isfile(path):
        return path
    # Somebody may have named it otherwise.
    given = Path(name).expanduser()
    if os.path.isfile(given):
        return given
    raise CacheStateError(f"{path}: no such file. Check the name.")


def _readable(path: Path, stack: ExitStack) -> str:
    """A name of the file that MLX can read: it goes by what that ends with."""
    if path.suffix == _SUFFIX and str(path).isprintable():
        return str(path)
    place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tova_mlx-")))
    link = place / f"prompt{_SUFFIX}"
    link.symlink_to(path.resolve())
    return str(link)


def _read(name: str) -> tuple[list[Any], dict[str, str]]:
    """What mlx-lm reads, of a file that it can read. Raises anything."""
    names, texts = tensor_file.check(name)
    if (told := texts.get(f"0.{_SUM}")) is not None:
        tensor_file.check_sum(name, _SUM, told)
    _check_names(names)
    _check_names(texts)
    loaded: Any = mlx_lm_cache.load_prompt_cache(name, return_metadata=True)
    caches, metadata = loaded
    kinds = sum(n.startswith("1.") for n in texts)
    layers = {n.split(".")[0] for n in names}
    if len(caches) != kinds or not layers <= {str(i) for i in range(kinds)}:
        raise ValueError(f"not the arrays of {kinds} caches")
    _check_kinds(caches)
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    metadata.pop(_SUM, None)
    return caches, metadata


def _check_kinds(caches: Iterable[Any]) -> None:
    """ValueError, TypeError for what is not a cache, or is one that cannot be."""
    for cache in caches:
        if not isinstance(cache, PolicyKVCache):
            check_own(cache)
        if isinstance(cache, mlx_lm_cache.CacheList):
            _check_kinds(cache.caches)


def _check_names(names: Iterable[str]) -> None:
    """ValueError for names of which mlx-lm would make far larger lists than they are.

    Deep ones, too: what is below each part of a name is copied.
    """
    longest: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        if len(parts) > _DEEPEST:
            raise ValueError(f"a name of {len(parts)} parts")
        for i, part in enumerate(parts):
            above = ".".join(parts[:i])
            with suppress(ValueError):
                longest[above] = max(longest.get(above, 0), int(part))
    if sum(longest.values()) > _LONGEST:
        raise ValueError("names of lists that are not there")


def _check_fits(
    path: Path, caches: list[Any], metadata: dict[str, str], model: nn.Module
) -> None:
    name = type(model).__module__
    if metadata.get(_FINGERPRINT) not in (None, fingerprint(model)):
        raise CacheStateError(
            f"{path}: saved with another model than this {name}. Load that model, or "
            "read the prompt again."
        )
    own = trace(model, mlx_lm_cache.make_prompt_cache(model))
    if len(own) != len(caches):
        raise CacheStateError(
            f"{path}: {len(caches)} layers, but {name} has {len(own)}. Load the model "
            "that it was saved with."
        )
    for layer, (ours, given) in enumerate(zip(own, caches, strict=True)):
        if (have := _what(given)) != (want := _what(ours)):
            raise CacheStateError(
                f"{path}: layer {layer} is {have}, but the model makes {want}. Use "
                "the options it was saved with, or read the prompt again."
            )
        for a, b in zip(leaves([ours]), leaves([given]), strict=True):
            pair = [getattr(c, "options", None) for c in (a, b)]
            if len({o and o.renumbering for o in pair}) > 1:
                raise CacheStateError(
                    f"{path}: layer {layer} has keys that {name} rotates otherwise. "
                    "Load the model that it was saved with."
                )
            if not b.empty() and (have := _shapes(b)) != (want := _shapes(a)):
                raise CacheStateError(
                    f"{path}: layer {layer} holds {have}, but {name} makes {want}. "
                    "Load the model that it was saved with."
                )
    used = [c for c in leaves(caches) if isinstance(c, PolicyKVCache) and not c.empty()]
    if len(seen := {c.seen for c in used}) > 1:
        raise CacheStateError(
            f"{path}: layers that have seen {sorted(seen)} tokens, so a forward was "
            "interrupted before it was saved. Read the prompt again."
        )


def _what(cache: Any) -> str:
    kind = type(cache).__name__
    if hasattr(cache, "caches"):
        return f"{kind}({', '.join(map(_what, cache.caches))})"
    if isinstance(cache, mlx_lm_cache.RotatingKVCache):
        return f"{kind}(max_size={cache.max_size}, keep={cache.keep})"
    if isinstance(cache, mlx_lm_cache.ChunkedKVCache):
        return f"{kind}(chunk_size={cache.chunk_size})"
    if isinstance(cache, mlx_lm_cache.ArraysCache):
        return f"{kind}({len(cache.cache)})"
    if not isinstance(cache, PolicyKVCache):
        return kind
    return f"{kind}({cache.options.describe()}, prefill={cache.prefill})"


def _shapes(cache: Any) -> str | None:
    """What the keys and values of a token are, or a state of one size."""
    if isinstance(cache, mlx_lm_cache.ArraysCache):
        # The second axis is that of the last tokens in some models.
        shapes = [["…", *a.shape[2:]] for a in cache.cache if a is not None]
        return f"arrays {shapes}"
    said = []
    for name in ("keys", "values"):
        entries: Any = getattr(cache, name, None)
        if len(getattr(entries, "shape", ())) != 4:
            return None
        heads, width = entries.shape[1], entries.shape[-1]
        said.append(f"{name} {arrays_of(entries)[-1].dtype}, {heads} heads of {width}")
    return " and ".join(said)
