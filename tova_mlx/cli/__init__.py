"""The command line `tova-mlx`. MLX is imported when a command runs, not before."""

import os
import sys

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

    def invoke(self, ctx: click.Context) -> object:
        _open_streams()
        try:
            return super().invoke(ctx)
        except TovaError as error:
            click.echo(in_options(error.line), err=True)
        except KeyboardInterrupt:
            # Below the ^C of a terminal.
            click.echo("\n" * sys.stderr.isatty() + "Interrupted.", err=True)
            sys.exit(130)
        sys.exit(1)


def _open_streams() -> None:
    """Open standard streams that are closed, on nothing.

    Or the next files opened would get their numbers, and MLX takes 0 for a failure.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


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
