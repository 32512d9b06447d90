"""Whether tokens have rows in a model: MLX reads past its memory for one without."""

from collections.abc import Iterable
from typing import Any

import mlx.nn as nn

from ..errors import PromptError


def vocabulary_size(model: nn.Module) -> int | None:
    """Return how many tokens have a row in the embeddings; None if there are none."""
    kinds = (nn.Embedding, nn.QuantizedEmbedding)
    tables: Any = [m for m in model.modules() if isinstance(m, kinds)]
    return max((m["weight"].shape[0] for m in tables), default=None)


def check_tokens(model: nn.Module, tokens: Iterable[int]) -> None:
    """Raise PromptError for a token that the model does not know.

    Tokenizers of some have more special ones than the model, for pictures say.
    """
    size = vocabulary_size(model)
    past = [t for t in tokens if size is not None and t >= size]
    if past:
        raise PromptError(
            f"Token {past[0]} of the prompt is past the {size} that the model knows. "
            "Leave special tokens out of the text."
        )


def check_tokenizer(model: nn.Module, tokenizer: Any) -> None:
    """Raise ValueError for a tokenizer of another model: all but special tokens."""
    size, special = vocabulary_size(model), tokenizer.get_added_vocab()
    for token, number in tokenizer.get_vocab().items():
        if size is not None and number >= size and token not in special:
            raise ValueError(
                f"the tokenizer's {token[:40]!r} is number {number}, and the model "
                f"knows {size} tokens"
            )
