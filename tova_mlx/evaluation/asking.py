"""A question in the words of a model's own chat template."""

from typing import Any

from ..errors import EvaluationError
from ..hooks.template import rendered


def check_template(tokenizer: Any, model: str) -> None:
    """Raises EvaluationError: a model that nobody can ask anything."""
    if not tokenizer.has_chat_template:
        raise EvaluationError(
            f"{model} has no chat template, so it cannot be asked a question. Use an "
            "instruction-tuned model."
        )


def asked(tokenizer: Any, text: str) -> str:
    """The prompt of a user's text, up to where the answer begins.

    Raises PromptError.
    """
    # Thoughts would fill the answer; a template without them ignores this.
    messages = [{"role": "user", "content": text}]
    return rendered(tokenizer, messages, tokenize=False, enable_thinking=False)
