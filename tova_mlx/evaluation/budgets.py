"""What a setting's caches take, and how many tokens fit in so many bytes.

Counted in half precision, as models are handed out, whatever type they are run in: on
Linux that is float32, which would halve what quantised entries cost beside the others.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache as make_default

from ..errors import OptionError
from ..models.budget import Budget
from ..models.conversion import bytes_at_most, make_prompt_cache, tokens_within
from ..models.report import trace, unbounded_bytes
from .reading import cache_options
from .results import Setting

# A size that every policy takes.
_ANY = 2**20


def tokens_kept(
    model: nn.Module, size: Any, setting: Setting, *, context: int | None
) -> int:
    """Return tokens per layer for a size.

    size: tokens, a `Budget`, or a Fraction of the bytes that `full` takes for `context`
    tokens. Raises OptionError: too small, or a share of what is not known.
    """
    if isinstance(size, int):
        return size
    options = cache_options(setting)
    with _in_half_precision(model, options):
        if isinstance(size, Fraction):
            if context is None:
                raise OptionError(
                    f"max_kv_size={size} is a share of the full cache for as many "
                    "tokens as the model was trained on, and its config.json does not "
                    "say how many. Use tokens, or bytes such as 64MB."
                )
            full = unbounded_bytes(trace(model, make_default(model)), context)
            size = Budget(str(size), int(size * full))
        return tokens_within(model, size, **options).tokens


def cache_bytes(model: nn.Module, setting: Setting, context: int) -> int:
    """Return the bytes that a setting's caches can reach within `context` tokens."""
    size, options = setting.max_kv_size, cache_options(setting)
    with _in_half_precision(model, options):
        if size is None:
            caches = make_prompt_cache(model, None, **options)
            return unbounded_bytes(trace(model, caches), context)
        most = bytes_at_most(model, min(size, context), **options)
    assert most is not None
    return most


@contextmanager
def _in_half_precision(model: nn.Module, options: dict[str, Any]) -> Iterator[None]:
    """Let a model that is traced make half-precision keys and values.

    options: of the caches that will be traced.
    """
    # Quantised ones are fitted to what the model computes, in its own type.
    make_prompt_cache(model, _ANY, **options)
    parameters = model.parameters()
    model.set_dtype(mx.float16)
    try:
        yield
    finally:
        model.update(parameters)
