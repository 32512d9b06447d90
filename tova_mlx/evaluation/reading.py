"""A model reads a text with a bounded cache: losses of its tokens, or an answer.

Every token sees what it would see if the text came one token at a time (stepwise
prefill), whatever the step. Memory: the cache and the logits of one step.
"""

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx_lm.generate import stream_generate

from ..models.conversion import make_prompt_cache
from .results import Setting

# Called with the number of tokens read since the last call.
Progress = Callable[[int], Any]


def first_ids(tokenizer: Any, text: str, n_tokens: int) -> list[int]:
    """At least the first `n_tokens` tokens, if the text has them, not all of a book."""
    # 16 characters a token are more than any text has; quietly, for the warning about
    # the model's context is not meant for who reads in windows.
    return list(tokenizer.encode(text[: 16 * n_tokens], verbose=False))


def cache_options(setting: Setting) -> dict[str, Any]:
    """What `make_prompt_cache` takes for a setting, but for the size.

    Nothing will be taken back.
    """
    policy, _, bits, group, recall = setting
    options: dict[str, Any] = {"policy": policy, "journal": 0}
    if bits is not None:
        options |= {"kv_bits": bits, "kv_group_size": group}
    if recall is not None:
        options["recall"] = recall
    return options


def new_cache(model: nn.Module, setting: Setting, **options: Any) -> list[Any]:
    """Caches of a setting. options: others of `make_prompt_cache`."""
    return make_prompt_cache(
        model, setting.max_kv_size, **{**cache_options(setting), **options}
    )


def read(
    model: nn.Module,
    tokens: mx.array,
    cache: list[Any],
    step: int,
    progress: Progress | None = None,
) -> Iterator[tuple[int, mx.array]]:
    """Feed tokens [B, n] to a cache: where each step begins, and its logits.

    What a step leaves in the cache is evaluated before the next one; logits only if
    the caller does it.
    """
    batch, n = tokens.shape
    for start in range(0, n, step):
        stop = min(start + step, n)
        yield start, model(tokens[:, start:stop], cache=cache)
        mx.eval([c.state for c in cache])
        mx.clear_cache()
        if progress is not None:
            progress(batch * (stop - start))


def filled(
    model: nn.Module,
    ids: list[int],
    setting: Setting,
    step: int,
    progress: Progress | None = None,
) -> list[Any]:
    """Caches of a setting that have read these tokens."""
    cache = new_cache(model, setting)
    for _ in read(model, mx.array([ids]), cache, step, progress):
        pass
    return cache


def token_losses(
    model: nn.Module,
    tokens: mx.array,
    setting: Setting,
    step: int,
    progress: Progress | None = None,
    first: int = 1,
    **options: Any,
) -> npt.NDArray[np.float32]:
    """Negative log-likelihoods of tokens [B, first:], given those before, in nats.

    tokens: int [B, n], rows of one length; first: at least 1; options: as in
    `new_cache`. Returns [B, n - first].
    """
    cache = new_cache(model, setting, **options)
    parts = []
    for start, logits in read(model, tokens[:, :-1], cache, step, progress):
        stop = start + logits.shape[1]
        wanted = max(start, first - 1)
        if wanted < stop:
            loss = nn.losses.cross_entropy(
                logits[:, wanted - start :].astype(mx.float32),
                tokens[:, wanted + 1 : stop + 1],
            )
            parts.append(np.array(loss))
    return np.concatenate(parts, axis=1)


def answer(
    model: nn.Module,
    tokenizer: Any,
    prompt: list[int],
    cache: list[Any],
    step: int,
    max_tokens: int,
) -> str:
    """What the model says after a prompt of tokens, greedily, to its own end.

    cache: has read what comes before the prompt, if anything; it reads on.
    """
    pieces = stream_generate(
        model,
        tokenizer,
        prompt,
        max_tokens=max_tokens,
        prompt_cache=cache,
        prefill_step_size=step,
    )
    return "".join(piece.text for piece in pieces)
