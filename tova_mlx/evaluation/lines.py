"""Files of one JSON object a line, kept whole through a kill; and texts to be read."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import EvaluationError

# Characters of a text: a device without end would fill the memory.
_MOST = 1 << 28


def read_text(path: Path, wanted: str = "Name a text file in UTF-8.") -> str:
    """A text file, its byte order mark left out; `wanted`: what to do without it.

    Raises EvaluationError.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(_MOST + 1)
        if len(text) <= _MOST:
            return text
        raise EvaluationError(
            f"{path}: has more than {_MOST >> 20} Mi characters. Give a part of it."
        )
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise EvaluationError(f"{path}: cannot be read ({reason}). {wanted}") from error


class Lines:
    """The objects in a file, which need not be there.

    A line that a killed run left unfinished is dropped, from the file too.

    Raises ValueError, OSError: the file holds something else, and stays as it is.
    """

    def __init__(self, path: Path):
        self.path = path
        if path.exists() and not path.is_file():
            raise ValueError("it is not a file")
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        *lines, unfinished = text.split("\n")
        self._objects = [_object(line) for line in lines]
        if unfinished:
            self._finish(lines, unfinished)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """What was there."""
        return iter(self._objects)

    def _finish(self, lines: list[str], unfinished: str) -> None:
        """Leave whole lines in the file."""
        if not unfinished.startswith("{"):
            raise ValueError(f"{unfinished[:40]!r}")
        try:
            self._objects.append(_object(unfinished))
            lines = [*lines, unfinished]
        except ValueError:
            # Killed before it was written to its end.
            pass
        new = self.path.with_suffix(".new")
        new.write_text("".join(f"{x}\n" for x in lines), encoding="utf-8")
        os.replace(new, self.path)

    def add(self, values: dict[str, Any], *, ensure_ascii: bool = True) -> str:
        """Append an object, on the disk when this returns; its line."""
        line = json.dumps(values, ensure_ascii=ensure_ascii, allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        return line


def _object(line: str) -> dict[str, Any]:
    """Raises ValueError."""
    try:
        found = json.loads(line)
    except RecursionError as error:
        raise ValueError("lists in lists without end") from error
    if not isinstance(found, dict):
        raise ValueError(f"{line[:40]!r}")
    return found
