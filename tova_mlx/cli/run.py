"""tova-mlx run: mlx-lm's own tools in bounded memory."""

import codecs
import io
import sys
from typing import Any

import click

from .options import cache_options, check
from .tools import TOOLS, run_tool


@click.command(
    short_help="mlx-lm's own tools in bounded memory",
    context_settings={
        "allow_interspersed_args": False,
        "ignore_unknown_options": True,
    },
)
@cache_options
@click.argument("tool", type=click.Choice(TOOLS))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(tool: str, arguments: tuple[str, ...], **options: Any) -> None:
    """mlx-lm's own tools in bounded memory

    What stands before TOOL are options of the caches; what follows it goes to
    mlx-lm's tool as it is, --help too. evaluate is lm-evaluation-harness and comes
    with the extra eval.

    Example: tova-mlx run --max-kv-size 512 generate --model demo --prompt "Why?"
    """
    check(options)
    if isinstance(sys.stdin, io.TextIOWrapper):
        # mlx-lm's tools take no halves of characters.
        only_ascii = codecs.lookup(sys.stdin.encoding).name == "ascii"
        encoding = "utf-8" if only_ascii else sys.stdin.encoding
        sys.stdin.reconfigure(encoding=encoding, errors="replace")
    run_tool(tool, arguments, options)
