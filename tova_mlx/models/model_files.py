"""A model's files, looked at before mlx-lm reads them: do their sizes fit?

mlx-lm builds as many layers as a config says, and compares them with the weights after.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import tensor_file

# Names in a config by which parts of a model are counted.
_COUNTED = re.compile(r"(num|n)_\w*(layer|block|expert|head|group|stack)s?")
# Of the parts that no array of the weights need be there for.
_FEW = 1024


def check_files(path: str) -> None:
    """Raise ValueError, OSError, RecursionError for files that cannot be a model's."""
    directory, arrays = Path(path), 0
    for file in sorted(directory.glob("*.safetensors")):
        try:
            arrays += len(tensor_file.check(file).names)
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(f"{file.name}: {error}") from error
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    for name, n in _counts(config):
        if n > max(arrays, _FEW):
            raise ValueError(f"config.json: {name} is {n}, of {arrays} arrays")


def _counts(config: Any) -> Iterator[tuple[str, int]]:
    """Yield what is counted, by name."""
    if not isinstance(config, dict):
        return
    for name, value in config.items():
        if type(value) is int and _COUNTED.fullmatch(name):
            yield name, value
        yield from _counts(value)
