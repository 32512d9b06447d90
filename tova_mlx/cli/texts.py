"""Texts that a command is given: as an argument, in a file, on stdin."""

import sys
from pathlib import Path

from ..errors import PromptError

# Of a text: a tokenizer takes some 170 times as much memory for it.
_MOST_BYTES = 16 << 20


def read_given(text: str | None, file: Path | None, name: str, what: str) -> str:
    """The text of a file, of stdin for "-", or the argument itself.

    name: of the argument; what: the text is, in a word, for errors.

    Raises PromptError: it cannot be read, is too large, not UTF-8 or has no words.
    """
    source = file or ("stdin" if text == "-" else name)
    try:
        if file is not None:
            with file.open("rb") as opened:
                data = opened.read(_MOST_BYTES + 1)
        elif text == "-":
            data = sys.stdin.buffer.read(_MOST_BYTES + 1)
        else:
            # Python keeps bytes of an argument that are not UTF-8 as surrogates.
            data = (text or "").encode("utf-8", "surrogateescape")
        if len(data) > _MOST_BYTES:
            raise PromptError(
                f"{source}: the {what} is larger than {_MOST_BYTES >> 20} MiB, and its "
                "tokens would take gigabytes. Give a part of it."
            )
        words = data.decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise PromptError(f"{source}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{source} is not UTF-8 text (byte {error.start}). Convert it first, for "
            "example with iconv."
        ) from error
    if not words.strip():
        raise PromptError(f"{source}: the {what} is empty. Give at least one word.")
    return words
