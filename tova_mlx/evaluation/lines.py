"""Files of one JSON object a line, kept whole through a kill; and texts to be read."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import EvaluationError


def read_text(path: Path, wanted: str = "Name a text file in UTF-8.") -> str:
    """A text file, its byte order mark left out; `wanted`: what to do without it.

    Raises EvaluationError.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise EvaluationError(f"{path}: cannot be read ({reason}). {wanted}") from error


class Lines:
    """The objects in a file, which need not be there.

    A line that a killed run left unfinished is dropped, from the file too.
    """

    def __init__(self, path: Path):
        self.path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        *self._lines, unfinished = text.split("\n")
        if unfinished:
            new = path.with_suffix(".new")
            new.write_text("".join(f"{x}\n" for x in self._lines), encoding="utf-8")
            os.replace(new, path)

    def __iter__(self) -> Iterator[Any]:
        """What was there. Raises ValueError at a line that is no JSON."""
        return map(json.loads, self._lines)

    def add(self, values: dict[str, Any], *, ensure_ascii: bool = True) -> str:
        """Append an object, on the disk when this returns; its line."""
        line = json.dumps(values, ensure_ascii=ensure_ascii, allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        return line
