"""What a chat template makes of a conversation, and what it puts before one."""

from collections.abc import Callable
from typing import Any

from ..errors import PromptError, reason_of


def rendered(tokenizer: Any, messages: list[dict[str, str]], **how: Any) -> Any:
    """Return the prompt of messages up to where the answer begins.

    how: as for `apply_chat_template`. Raises PromptError.
    """
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, **how
        )
    except Exception as error:
        # A template is a program and can raise anything.
        raise PromptError(
            "The model's chat template does not take the conversation "
            f"({reason_of(error)}). Leave the system prompt out, or use another model."
        ) from error


def beginning_of(tokens_for: Callable[[str], list[int]]) -> list[int]:
    """Return the tokens that are there whatever the first question's text.

    tokens_for: the prompt for a text as the first question.
    """
    one, other = tokens_for("a"), tokens_for("b")
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(differ, 0)]
