"""Prompts saved to a file and loaded again, or refused with the reason.

mlx-lm writes and reads the files; its own `save_prompt_cache` and `load_prompt_cache`
work on our caches too once one was made. These add what a file cannot survive without
being noticed: writing half of it, and loading it where it does not belong.
"""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import cache as mlx_lm_cache

from .cache import PolicyKVCache, register
from .errors import CacheStateError
from .layers import leaves
from .packed import Packed, arrays
from .report import trace

_MODEL = "tova_mlx_model"
# Norms, biases and scales: enough to tell two models apart, soon read.
_SMALL = 1 << 16


def save_prompt_cache(
    path: str | os.PathLike[str],
    cache: list[Any],
    *,
    model: nn.Module | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write the caches of a prompt to a `.safetensors` file, all of it or nothing.

    model: the model that read the prompt; its fingerprint goes into the file.

    Raises CacheStateError if the file cannot be written; what was there stays.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path.with_name(path.name + ".safetensors")
    metadata = dict(metadata or {})
    if model is not None:
        metadata[_MODEL] = fingerprint(model)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tova_mlx-") as place:
            written = Path(place) / path.name
            mlx_lm_cache.save_prompt_cache(str(written), cache, metadata)
            os.replace(written, path)
    except (OSError, RuntimeError) as error:
        raise CacheStateError(
            f"{path}: cannot save the prompt ({error}). Check the directory and the "
            "space on the disk."
        ) from error


def load_prompt_cache(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
) -> tuple[list[Any], dict[str, str]]:
    """The caches that a file holds, and its metadata.

    model: what will go on with them; if given, the caches must be like the ones that
    it makes (`convert`) and, if the file has a fingerprint, be of this very model.

    Raises CacheStateError: the file is missing, cut off or no prompt, or does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise CacheStateError(f"{path}: no such file. Check the name.")
    register()
    try:
        caches, metadata = mlx_lm_cache.load_prompt_cache(
            str(path), return_metadata=True
        )
        mx.eval([c.state for c in caches])
    except CacheStateError as error:
        raise CacheStateError(f"{path}: {error}") from error
    except Exception as error:
        # Anything may come out of a damaged file.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CacheStateError(
            f"{path}: not a whole saved prompt ({reason[0][:200]}). Save it again."
        ) from error
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    if model is not None:
        _check_fits(path, caches, metadata, model)
    return caches, metadata


def fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes and types of all parameters and of the small ones."""
    digest = hashlib.sha256()
    named: Any = tree_flatten(model.parameters())
    for name, array in sorted(named, key=lambda pair: pair[0]):
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        if array.nbytes <= _SMALL:
            digest.update(np.array(array.view(mx.uint8)).tobytes())
    return digest.hexdigest()[:32]


def _check_fits(
    path: Path, caches: list[Any], metadata: dict[str, str], model: nn.Module
) -> None:
    name = type(model).__module__
    if metadata.get(_MODEL) not in (None, fingerprint(model)):
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
            if not b.empty() and (have := _rows(b)) != (want := _rows(a)):
                raise CacheStateError(
                    f"{path}: layer {layer} holds keys {have}, but {name} makes "
                    f"{want}. Load the model that it was saved with."
                )


def _what(cache: Any) -> str:
    kind = type(cache).__name__
    if hasattr(cache, "caches"):
        return f"{kind}({', '.join(map(_what, cache.caches))})"
    if not isinstance(cache, PolicyKVCache):
        return kind
    rule = ", ".join(f"{k}={v}" for k, v in cache.rule.as_dict().items())
    kept = cache.slots.storage
    if kept.key_bits is not None:
        rule += f", kv_bits=({kept.key_bits}, {kept.value_bits})"
        rule += f", kv_group_size={kept.group_size}"
    return f"{kind}({rule}, prefill={cache.prefill})"


def _rows(cache: Any) -> str | None:
    keys = getattr(cache, "keys", None)
    if not isinstance(keys, (mx.array, Packed)):
        return None
    return f"{arrays(keys)[-1].dtype}, {keys.shape[1]} heads of {keys.shape[-1]}"
