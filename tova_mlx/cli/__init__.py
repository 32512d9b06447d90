"""The command line `tova-mlx`. MLX is imported when a command runs, not before."""

import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

import click

from .. import __version__
from ..errors import TovaError
from .bench import bench
from .chat import chat
from .evaluation import evaluation
from .generate import generate
from .info import info
from .inspection import inspect
from .options import in_options
from .run import run
from .serve import serve


class _Group(click.Group):
    """Prints an error raised on purpose as one line; exit 1, or 130 after Ctrl-C."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        _open_streams()
        try:
            try:
                return super().main(*arguments, **options)
            finally:
                _flush()
        except BrokenPipeError:
            # A reader that left ends a command quietly.
            sys.exit(1)
        except OSError as error:
            click.echo(f"Error: {_failed(error)}", err=True)
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> object:
        try:
            with _quiet_imports():
                return super().invoke(ctx)
        except TovaError as error:
            click.echo(in_options(error.line), err=True)
        except KeyboardInterrupt:
            # Below the ^C of a terminal.
            click.echo("\n" * sys.stderr.isatty() + "Interrupted.", err=True)
            sys.exit(130)
        sys.exit(1)


@contextmanager
def _quiet_imports() -> Iterator[None]:
    """Let Ctrl-C end the process at once while something is imported.

    What it raises there may be lost, or come out of a library as another error.
    """

    def press(number: int, frame: FrameType | None) -> NoReturn:
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                os.write(2, b"Interrupted.\n")
                os._exit(130)
            frame = frame.f_back
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        # Ignored, or somebody else's.
        yield
        return
    signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _flush() -> None:
    """Write what is left for standard output, or raise OSError.

    At Python's end it would be too late to say that this fails, and it would fail there
    once more if anything was still left.
    """
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        raise


def _open_streams() -> None:
    """Open standard streams that are closed, on nothing, and let all take any text.

    Or the next files opened would get their numbers, and MLX takes 0 for a failure.
    Bytes that are no text, and text that a stream's encoding lacks, end no command.
    """
    for name, mode, errors in (
        ("stdin", "r", "surrogateescape"),
        ("stdout", "w", "replace"),
        ("stderr", "w", "backslashreplace"),
    ):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _failed(error: OSError) -> str:
    """What cannot be read or written, in a line."""
    reason = error.strerror or " ".join(str(error).split())
    # What is written to by a descriptor has no name.
    return f"{error.filename or 'standard output, or another stream'}: {reason}."


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Language models in constant memory: bounded caches for mlx-lm"""


main.add_command(bench)
main.add_command(chat)
main.add_command(evaluation)
main.add_command(generate)
main.add_command(info)
main.add_command(inspect)
main.add_command(run)
main.add_command(serve)
