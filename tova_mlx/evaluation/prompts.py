"""What a model is asked, in the words of its own chat template.

The document comes before the question, so that nothing tells a bounded cache what will
be asked while it reads. A document that does not fit the context the model was trained
for is cut in the middle: the limit of the cache is what is studied, not positions that
the model never saw.

Source: the wording of the questions follows ZeroSCROLLS (Shaham et al. 2023, arXiv
2305.14196). Differs from the source: a chat template instead of a trailing "Answer:",
and a cut in the middle instead of at the end.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import EvaluationError
from .asking import asked, check_template
from .tasks import Example

TEMPLATES = {
    "squality": (
        "You are given a story and a question. Answer the question in a paragraph.\n\n"
        "Story:\n{document}\n\nQuestion:\n{question}"
    ),
    "qasper": (
        "You are given a scientific article and a question. Answer the question as "
        "concisely as you can, using a single phrase or sentence if possible. If the "
        'question cannot be answered from the article, write "unanswerable". If it '
        'is a yes/no question, answer "yes", "no" or "unanswerable". Do not give '
        "an explanation.\n\nArticle:\n{document}\n\nQuestion:\n{question}"
    ),
    # After the text: a cache that keeps the newest would forget it before.
    "story": (
        "Story:\n{document}\n\nThe story stops here. Write how it goes on, in the same "
        "style."
    ),
}
_GAP = "\n[…]\n"


class Prompt(NamedTuple):
    """Tokens of a prompt, and how many of its document were cut out."""

    tokens: list[int]
    cut_tokens: int


class Prompts:
    """Makes prompts for a tokenizer's model, no longer than its context.

    Args:
        tokenizer: from `mlx_lm.load`.
        model: its name, for errors.
        context: tokens that prompt and answer may have together; None for any number.

    Raises:
        EvaluationError: there is no chat template.
    """

    def __init__(self, tokenizer: Any, model: str, context: int | None):
        check_template(tokenizer, model)
        self.tokenizer, self.context = tokenizer, context

    def make(self, task: str, example: Example, max_tokens: int) -> Prompt:
        """The prompt of an example; `max_tokens`: what its answer may take.

        Raises EvaluationError: no room for a document.
        """
        template, question = TEMPLATES[task], example.question

        def render(document: str) -> tuple[list[int], int]:
            """Tokens, and how many are too many."""
            tokens = self._ask(template.format(document=document, question=question))
            room = len(tokens) if self.context is None else self.context - max_tokens
            return tokens, len(tokens) - room

        tokens, excess = render(example.document)
        if excess <= 0:
            return Prompt(tokens, 0)
        ids = self._encode(example.document)
        kept = len(ids)
        while excess > 0:
            kept -= excess
            if kept < 2:
                raise EvaluationError(
                    f"{task}: --max-tokens {max_tokens} and the question leave no room "
                    f"for a document in the {self.context} tokens that the model was "
                    "trained for. Use fewer --max-tokens."
                )
            ends = ids[: kept // 2], ids[len(ids) - (kept - kept // 2) :]
            # Where the ends are put together tokens may form anew, hence the loop.
            tokens, excess = render(_GAP.join(map(self.tokenizer.decode, ends)))
        return Prompt(tokens, len(ids) - kept)

    def _ask(self, text: str) -> list[int]:
        return self._encode(asked(self.tokenizer, text))

    def _encode(self, text: str) -> list[int]:
        # Not verbose: transformers would warn of texts that are cut right after.
        ids = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return list(ids)


def trained_context(model_path: str) -> int | None:
    """Tokens that a model was trained to see, by its config.json; None if unsaid.

    A config that says nothing right is refused when the model is loaded.
    """
    try:
        text = (Path(model_path) / "config.json").read_text(encoding="utf-8")
        config = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return None
    parts = [config, config.get("text_config") if isinstance(config, dict) else None]
    for values in parts:
        for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
            n = values.get(name) if isinstance(values, dict) else None
            if type(n) is int and n > 0:
                return n
    return None
