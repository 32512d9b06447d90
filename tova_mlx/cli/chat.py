"""tova-mlx chat: a conversation in constant memory."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from ..errors import TovaError
from ..progress import Bar
from .options import (
    cache_arguments,
    cache_options,
    check,
    model_option,
    pin_option,
    sampling_options,
    settle_size,
)
from .saving import saving

if TYPE_CHECKING:
    from ..models.conversation import Conversation

COMMANDS = """\
/reset       forget the conversation
/save FILE   write it to FILE
/load FILE   go on with the one in FILE
/stats       what each layer holds
/recalled    the evicted tokens attended to most, with --recall
/help        these lines
/exit        leave (also Ctrl-D)
Ctrl-C stops an answer, or the reading of a question; twice: at once."""


# Texts that /recalled shows.
_SHOWN = 16


@click.command(short_help="A conversation in constant memory")
@model_option
@partial(cache_options, positions="auto")
@sampling_options
@click.option("--system-prompt", help="Text of a system message at the start.")
@pin_option
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

    from ..models.conversation import Conversation
    from ..models.conversion import convert

    settle_size(model, options, journal=0)
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
        pin_system=options["pin_system"],
        max_tokens=options["max_tokens"],
        sampler=make_sampler(options["temp"], options["top_p"]),
        prefill_step_size=options["prefill_step_size"],
    )
    from ..models.rotary import said_of

    positions = said_of(model, options["positions"], conversation.caches)
    with _CtrlC.in_terminal() as ctrl_c:
        limit = options["max_kv_size"]
        rows = {
            "model": path,
            "policy": options["policy"],
            "tokens held": "no limit" if options["policy"] == "full" else str(limit),
            "positions": positions,
            "pinned": _pinned(conversation),
        }
        read = _reader(rows, ctrl_c)
        while (line := read()) is not None:
            words = line.split(maxsplit=1)
            if not words:
                continue
            try:
                if not words[0].startswith("/"):
                    _answer(conversation, line, ctrl_c)
                elif words[0] == "/exit":
                    break
                else:
                    _command(conversation, *words)
            except TovaError as error:
                click.echo(error.line, err=True)
        if conversation.begun:
            click.echo(saving(model, conversation.caches), err=True)


class _CtrlC:
    """What Ctrl-C does in a terminal: it never ends the chat.

    While a question is answered the first one is only noted, since an exception in the
    middle of a step leaves some layers a token ahead of others. The second raises
    KeyboardInterrupt, and later ones do nothing, so that things are put in order.
    In a pipe this is not in place, and Ctrl-C ends the program as any other.
    """

    def __init__(self, installed: bool):
        self.installed = installed
        self._pressed, self._raises_at = 0, 0

    @classmethod
    @contextmanager
    def in_terminal(cls) -> "Iterator[_CtrlC]":
        """In place while stdin is a terminal."""
        ctrl_c = cls(sys.stdin.isatty())
        if not ctrl_c.installed:
            yield ctrl_c
            return
        before = signal.signal(signal.SIGINT, ctrl_c)
        try:
            yield ctrl_c
        finally:
            signal.signal(signal.SIGINT, before)

    def __call__(self, *_: Any) -> None:
        self._pressed += 1
        if self._pressed == self._raises_at:
            raise KeyboardInterrupt

    def raise_at(self, presses: int) -> None:
        """Count from here on, and raise once, when as many came; 0: never."""
        self._pressed, self._raises_at = 0, presses

    def pressed(self) -> bool:
        return self._pressed > 0


def _pinned(conversation: "Conversation") -> str:
    """How much of the system prompt stays."""
    if not conversation.pin_system:
        return "nothing"
    whole, pinned = conversation.system_tokens, conversation.pinned
    if pinned < whole and any(c.max_size for c in _bounded(conversation)):
        return f"the first {pinned} of the system prompt's {whole} tokens"
    return f"the system prompt, {whole} tokens"


def _bounded(conversation: "Conversation") -> list[Any]:
    from ..hooks.layers import leaves

    return [c for c in leaves(conversation.caches) if hasattr(c, "pin")]


def _reader(rows: dict[str, str], ctrl_c: _CtrlC) -> Callable[[], str | None]:
    """A function that gives the next line, None at the end; rows: said at the start."""
    if not ctrl_c.installed:
        said = ", ".join(f"{k}: {v}" for k, v in rows.items() if k != "model")
        click.echo(said, err=True)
        return _read_pipe
    from mlx_lm.cli_ui import corridor_input, make_console, print_header_panel

    with suppress(ImportError):
        import readline  # noqa: F401  (gives `input` a history)
    console = make_console()
    print_header_panel(console, "tova-mlx chat", [*rows.items(), ("commands", "/help")])

    def read() -> str | None:
        while True:
            try:
                ctrl_c.raise_at(1)
                line = corridor_input(console)
                ctrl_c.raise_at(0)
            except EOFError:
                return None
            except KeyboardInterrupt:
                click.echo("Type /exit or Ctrl-D to leave.", err=True)
            else:
                return _text(line.encode("utf-8", errors="surrogateescape"))

    return read


def _read_pipe() -> str | None:
    line = sys.stdin.buffer.readline()
    return _text(line).rstrip("\r\n") if line else None


def _text(line: bytes) -> str:
    """A line that is not UTF-8 must not end the conversation."""
    return line.decode("utf-8", errors="replace")


def _answer(conversation: "Conversation", question: str, ctrl_c: _CtrlC) -> None:
    last = None
    try:
        ctrl_c.raise_at(2)
        try:
            with Bar(delay=0.5) as bar:
                for last in conversation.ask(question, ctrl_c.pressed, bar.reached):
                    click.echo(last.text, nl=False)
            if ctrl_c.pressed():
                click.echo(" [stopped]", err=True, nl=False)
        finally:
            ctrl_c.raise_at(0)
            click.echo()
    except KeyboardInterrupt:
        if not ctrl_c.installed:
            raise
        click.echo(_interrupted(conversation, last), err=True)
        return
    speed = f"{last.generation_tps:.1f} tokens/s, " if last else ""
    click.echo(f"  {speed}{_totals(conversation)}", err=True)


def _interrupted(conversation: "Conversation", last: Any) -> str:
    """What a second Ctrl-C came to; `last`: what was answered last."""
    from ..models.conversation import NOT_READ

    if last is None:
        return NOT_READ
    if conversation.is_unread:
        return (
            "Stopped in the middle of a step, which cannot be taken back. All that was "
            "said is read again with the next question."
        )
    return f"Stopped. {_totals(conversation)}"


def _command(conversation: "Conversation", name: str, argument: str = "") -> None:
    if name == "/reset":
        conversation.reset()
        click.echo("The conversation starts anew.", err=True)
    elif name in ("/save", "/load") and not argument.strip():
        click.echo(f"Error: {name} needs a FILE.", err=True)
    elif name == "/save":
        path = conversation.save(argument.strip())
        click.echo(f"Saved to {path.absolute()}.", err=True)
    elif name == "/load":
        conversation.load(argument.strip())
        click.echo(f"Loaded: {_totals(conversation)}", err=True)
    elif name == "/stats":
        from ..models.report import describe

        report = describe(conversation.caches)
        click.echo(str(report), err=True)
        if report.totals["archived"]:
            click.echo(_recalled(conversation, report), err=True)
    elif name == "/recalled":
        click.echo(_texts(conversation), err=True)
    elif name == "/help":
        click.echo(COMMANDS, err=True)
    else:
        click.echo(f"Error: {name} is no command. Type /help for them.", err=True)


def _recalled(conversation: "Conversation", report: Any) -> str:
    """How much is shown, and whether an archive on disk takes no more."""
    tokens = sum(r.stop - r.start for r in conversation.recalled())
    said = (
        f"recall: {report.totals['archived']} evicted tokens a layer in the archive; "
        f"/recalled shows the {tokens} that some layer attended to most"
    )
    failed = {getattr(c, "archive_failed", "") for c in _bounded(conversation)} - {""}
    return "\n".join([said, *sorted(failed)[:1]])


def _texts(conversation: "Conversation") -> str:
    """The texts attended to most, those that most layers did first."""
    found = conversation.recalled()
    if not found:
        return "Nothing was recalled."
    found = sorted(found, key=lambda r: (-r.layers, r.start))
    lines = [
        f"{r.start:>7}  {r.layers:>3} {'layer ' if r.layers == 1 else 'layers'}  "
        f"{' '.join(r.text.split())}"
        for r in found[:_SHOWN]
    ]
    rest = len(found) - _SHOWN
    return "\n".join([*lines, *([f"… and {rest} more"] if rest > 0 else [])])


def _totals(conversation: "Conversation") -> str:
    from ..models.report import describe

    totals = describe(conversation.caches).totals
    return (
        f"{totals['tokens_seen']} tokens seen, {totals['tokens_held']} held, "
        f"cache {totals['bytes_now']:,} bytes"
    )
