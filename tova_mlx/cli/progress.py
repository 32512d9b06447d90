"""A bar on stderr for what takes long; in a pipe only what is being done, if that."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

# What is said beside the bar, in characters: a task and a setting.
_WIDTH = 24


@contextmanager
def progress_bar(
    length: int, *, silent_in_pipe: bool = False
) -> Iterator[tuple[Callable[[int], None], Callable[..., None]]]:
    """Show a bar with an ETA on stderr: functions to advance it and to say more."""
    if silent_in_pipe and not sys.stderr.isatty():
        yield lambda n: None, lambda *what: None
        return
    label = f"{'Reading':{_WIDTH}}"
    with click.progressbar(length=length, file=sys.stderr, label=label) as bar:

        def say(*what: Any) -> None:
            bar.label = f"{' '.join(map(str, what)):{_WIDTH}}"

        yield bar.update, say
