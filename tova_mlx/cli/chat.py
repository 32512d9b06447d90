"""tova-mlx chat: a conversation in constant memory."""

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from ..errors import TovaError
from .options import (
    cache_arguments,
    cache_options,
    check,
    model_option,
    sampling_options,
)

if TYPE_CHECKING:
    from ..chat import Conversation

COMMANDS = """\
/reset       forget the conversation
/save FILE   write it to FILE
/load FILE   go on with the one in FILE
/stats       what each layer holds
/help        these lines
/exit        leave (also Ctrl-D)
Ctrl-C stops an answer."""


@click.command(short_help="A conversation in constant memory")
@model_option
@cache_options
@sampling_options
@click.option("--system-prompt", help="Text of a system message at the start.")
def chat(**options: Any) -> None:
    """A conversation in constant memory; type /help in it for its commands

    Reads questions line by line, from a terminal or a pipe. Answers go to stdout,
    everything else to stderr.

    Example: tova-mlx chat --max-kv-size 1024 --policy fade
    """
    check(options)
    from .models import load

    model, tokenizer, path = load(options["model"])
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    from ..chat import Conversation
    from ..conversion import convert

    convert(
        model,
        journal=0,
        **cache_arguments(options),
    )
    mx.random.seed(options["seed"])
    conversation = Conversation(
        model,
        tokenizer,
        system_prompt=options["system_prompt"],
        max_tokens=options["max_tokens"],
        sampler=make_sampler(options["temp"], options["top_p"]),
        prefill_step_size=options["prefill_step_size"],
    )
    read = _reader(path, options)
    while (line := read()) is not None:
        words = line.split(maxsplit=1)
        if not words:
            continue
        try:
            if not words[0].startswith("/"):
                _answer(conversation, line)
            elif words[0] == "/exit":
                break
            else:
                _command(conversation, *words)
        except TovaError as error:
            click.echo(error.line, err=True)


def _reader(path: str, options: dict[str, Any]) -> Any:
    """A function that gives the next line, None at the end."""
    if not sys.stdin.isatty():
        return _read_pipe
    from mlx_lm.cli_ui import corridor_input, make_console, print_header_panel

    with suppress(ImportError):
        import readline  # noqa: F401  (gives `input` a history)
    console = make_console()
    limit = "no limit" if options["policy"] == "full" else str(options["max_kv_size"])
    rows = [("model", path), ("policy", options["policy"]), ("tokens held", limit)]
    print_header_panel(console, "tova-mlx chat", [*rows, ("commands", "/help")])

    def read() -> str | None:
        while True:
            try:
                return corridor_input(console)
            except EOFError:
                return None
            except KeyboardInterrupt:
                click.echo("Type /exit or Ctrl-D to leave.", err=True)

    return read


def _read_pipe() -> str | None:
    line = sys.stdin.buffer.readline()
    if not line:
        return None
    # A line that is not UTF-8 must not end the conversation.
    return line.decode("utf-8", errors="replace").rstrip("\r\n")


def _answer(conversation: "Conversation", question: str) -> None:
    from ..chat import stopped_by_ctrl_c

    last = None
    with stopped_by_ctrl_c() as stopped:
        try:
            for last in conversation.ask(question, stopped):
                click.echo(last.text, nl=False)
            if stopped():
                click.echo(" [stopped]", err=True, nl=False)
        finally:
            click.echo()
        speed = f"{last.generation_tps:.1f} tokens/s, " if last else ""
        click.echo(f"  {speed}{_totals(conversation)}", err=True)


def _command(conversation: "Conversation", name: str, argument: str = "") -> None:
    if name == "/reset":
        conversation.reset()
        click.echo("The conversation starts anew.", err=True)
    elif name in ("/save", "/load") and not argument.strip():
        click.echo(f"Error: {name} needs a FILE.", err=True)
    elif name == "/save":
        conversation.save(argument.strip())
        click.echo(f"Saved to {argument.strip()}.", err=True)
    elif name == "/load":
        conversation.load(argument.strip())
        click.echo(f"Loaded: {_totals(conversation)}", err=True)
    elif name == "/stats":
        from ..report import describe

        click.echo(str(describe(conversation.caches)), err=True)
    elif name == "/help":
        click.echo(COMMANDS, err=True)
    else:
        click.echo(f"Error: {name} is no command. Type /help for them.", err=True)


def _totals(conversation: "Conversation") -> str:
    from ..report import describe

    totals = describe(conversation.caches).totals
    return (
        f"{totals['tokens_seen']} tokens seen, {totals['tokens_held']} held, "
        f"cache {totals['bytes_now']:,} bytes"
    )
