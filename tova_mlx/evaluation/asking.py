"""A question in the words of a model's own chat template."""

from typing import Any

from ..errors import EvaluationError


def check_template(tokenizer: Any, model: str) -> None:
    """Raises EvaluationError: a model that nobody can ask anything."""
    if not tokenizer.has_chat_template:
        raise EvaluationError(
            f"{model} has no chat template, so it cannot be asked a question. Use an "
            "instruction-tuned model."
        )


def asked(tokenizer: Any, text: str) -> str:
    """The prompt of a user's text, up to where the answer begins."""
    # Thoughts would fill the answer; a template without them ignores this.
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        add_generation_prompt=True,
        tokenize=False,
        enable_thinking=False,
    )
