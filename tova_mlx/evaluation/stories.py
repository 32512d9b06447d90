"""A story that goes on with a bounded cache, and what the full model thinks of it.

Tokens are drawn, or a small model would say the same line for ever; the end is not
among them, so that all stories are equally long and compare.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import stream_generate
from mlx_lm.sample_utils import make_sampler

from .reading import token_losses
from .results import Setting


def tell(
    model: nn.Module,
    tokenizer: Any,
    prompt: list[int],
    cache: list[Any],
    step: int,
    max_tokens: int,
    temp: float,
    seed: int,
) -> tuple[str, list[int]]:
    """Text and tokens of a story, `max_tokens` long. cache: as for `answer`."""
    mx.random.seed(seed)
    pieces = list(
        stream_generate(
            model,
            tokenizer,
            prompt,
            max_tokens=max_tokens,
            sampler=make_sampler(temp),
            logits_processors=[_without(tokenizer.eos_token_ids)],
            prompt_cache=cache,
            prefill_step_size=step,
        )
    )
    return "".join(p.text for p in pieces), [p.token for p in pieces]


def loss_under_full(
    model: nn.Module, prompt: list[int], story: list[int], step: int
) -> float:
    """Mean negative log-likelihood of the story's tokens, nothing dropped, in nats."""
    tokens = mx.array([prompt + story])
    full = Setting("full", None)
    return float(token_losses(model, tokens, full, step, first=len(prompt)).mean())


def _without(tokens: set[int]) -> Callable[[mx.array, mx.array], mx.array]:
    banned = mx.array(sorted(tokens))

    def process(_: mx.array, logits: mx.array) -> mx.array:
        logits[..., banned] = -mx.inf
        return logits

    return process
