"""What models wrote to each example: one JSON object a line, to be read by people.

A run that was killed goes on with the next example: what is there is not asked again.
"""

from pathlib import Path
from typing import Any

from ..errors import EvaluationError, reason_of
from .lines import Lines
from .results import Setting
from .rows import ANSWERS, check


class Answers:
    """The answers in a directory's answers.jsonl.

    Args:
        directory: must be there.
        same: what an answer must share to count as one of this run.

    Raises:
        EvaluationError: the file is there and holds something else.
    """

    def __init__(self, directory: Path, same: dict[str, Any]):
        self.path, self._same = directory / "answers.jsonl", same
        self._known: dict[tuple[str, str, Setting], dict[str, Any]] = {}
        try:
            self._lines = Lines(self.path)
            for answer in self._lines:
                if all(answer[name] == value for name, value in same.items()):
                    check(answer, ANSWERS)
                    self._remember(answer)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"{self.path} holds something that is no answer of an evaluation "
                f"({reason_of(error)}). Name another --out, or move it away."
            ) from error

    def get(self, task: str, prompt: str, setting: Setting) -> dict[str, Any] | None:
        """The answer to a task's prompt (its digest), or None."""
        return self._known.get((task, prompt, setting))

    def add(
        self, task: str, prompt: str, setting: Setting, **values: Any
    ) -> dict[str, Any]:
        """Append an answer and have it on the disk when this returns."""
        setting_row = setting.to_row()
        answer = {"prompt": prompt, **setting_row, "task": task, **values, **self._same}
        self._lines.add(answer, ensure_ascii=False)
        self._remember(answer)
        return answer

    def _remember(self, answer: dict[str, Any]) -> None:
        key = (answer["task"], answer["prompt"], Setting.of(answer))
        self._known[key] = answer
