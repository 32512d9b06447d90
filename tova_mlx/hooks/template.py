"""What a chat template puts before a conversation."""

from collections.abc import Callable


def beginning_of(tokens_for: Callable[[str], list[int]]) -> list[int]:
    """Return the tokens that are there whatever the first question's text.

    tokens_for: the prompt for a text as the first question.
    """
    one, other = tokens_for("a"), tokens_for("b")
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(differ, 0)]
