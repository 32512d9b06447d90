"""Files of one JSON object a line, kept whole through a kill; and texts to be read."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from ..files import written_whole

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
        # Bytes: what is unfinished may end within a character.
        data = path.read_bytes() if path.exists() else b""
        *lines, unfinished = data.split(b"\n")
        self._objects = [_object(line) for line in lines]
        if unfinished:
            self._finish(data, unfinished)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """What was there."""
        return iter(self._objects)

    def _finish(self, data: bytes, unfinished: bytes) -> None:
        """Leave whole lines in the file."""
        if not unfinished.startswith(b"{"):
            raise ValueError(f"{unfinished[:40]!r}")
        try:
            self._objects.append(_object(unfinished))
            data += b"\n"
        except ValueError:
            # Killed before it was written to its end.
            data = data.removesuffix(unfinished)
        with written_whole(self.path) as new:
            new.write_bytes(data)

    def add(self, values: dict[str, Any], *, ensure_ascii: bool = True) -> str:
        """Append an object, on the disk when this returns; its line.

        Raises EvaluationError if it cannot be written; the file is as before.
        """
        line = json.dumps(values, ensure_ascii=ensure_ascii, allow_nan=False)
        size = None
        try:
            with self.path.open("ab") as file:
                size = file.tell()
                file.write(f"{line}\n".encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if size is not None:
                with suppress(OSError):
                    os.truncate(self.path, size)
            raise EvaluationError(
                f"{self.path}: cannot be written ({error.strerror}). Make room, or "
                "name another --out; what is there stays, and the same command goes on."
            ) from error
        return line


def _object(line: bytes) -> dict[str, Any]:
    """Raises ValueError."""
    try:
        found = json.loads(line.decode())
    except RecursionError as error:
        raise ValueError("lists in lists without end") from error
    if not isinstance(found, dict):
        raise ValueError(f"{line[:40]!r}")
    return found
