"""tova-mlx inspect: when each layer evicted each token of a text, as a page."""

import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..progress import Bar
from ..tables import table
from .options import (
    cache_arguments,
    cache_options,
    check,
    model_option,
    settle_size,
)
from .parameters import PolicyName, UserPath
from .texts import read_given

if TYPE_CHECKING:
    from ..inspection.record import Inspection, Record

_POLICIES = click.option(
    "--policy",
    "policies",
    type=PolicyName(),
    multiple=True,
    default=("tova",),
    show_default=True,
    help="Which tokens are kept; given twice, two policies are seen side by side.",
)


@click.command(short_help="Which tokens each layer keeps of a text, as a page")
@click.argument("text", metavar="TEXT_OR_FILE")
@click.option(
    "--out",
    type=UserPath(path_type=Path, dir_okay=False),
    help="Write the HTML page to this file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@model_option
@partial(cache_options, size=256, policy=_POLICIES)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    help="Tokens read of the text, at most.",
)
@click.option(
    "--prefill-step-size",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Tokens read per step.",
)
def inspect(
    text: str,
    out: Path | None,
    as_json: bool,
    policies: tuple[str, ...],
    **options: Any,
) -> None:
    """Which tokens each layer keeps of a text, as an HTML page that needs no network

    TEXT_OR_FILE is the name of a file, or the text itself; '-' is stdin. It is read as
    it is, without a chat template. On the page each token is coloured by the share of
    layers that still hold it, with a slider over the tokens read; a token says when
    each layer evicted it, and the policy's score then.

    Example: tova-mlx inspect novel.txt --policy tova --policy h2o --out page.html
    """
    settings = _settings(policies, options)
    if out is None and not as_json:
        raise click.UsageError("Give --out FILE for the page, --json, or both.")
    _check_out(out)
    words = _read(text)
    from .models import load

    model, tokenizer, path = load(options["model"])
    from ..inspection.recording import encode, inspect

    for setting in settings:
        settle_size(model, setting, journal=0)
    ids = encode(tokenizer, words, options["tokens"])
    n = min(len(ids), options["tokens"])
    found: Inspection | None = None
    cost = n * len(settings)
    with Bar(cost) as bar:
        for setting in settings:
            bar.say(setting["policy"])
            read = inspect(
                model,
                tokenizer,
                ids,
                max_tokens=options["tokens"],
                prefill_step_size=options["prefill_step_size"],
                name=Path(options["model"] or path).name,
                progress=bar.advance,
                **cache_arguments(setting),
            )
            found = read if found is None else found.beside(read)
    assert found is not None
    for record in found.records:
        if not any((layer.evicted < n).any() for layer in record.layers):
            click.echo(
                f"{record.label}: of {n} tokens none was evicted. Give a longer text "
                "or a smaller --max-kv-size to see some go.",
                err=True,
            )
    if out is not None:
        found.save(out)
    if as_json:
        click.echo(json.dumps({**found.to_dict(), "page": out and str(out)}))
    else:
        assert out is not None
        click.echo(_table(found))
        size = out.stat().st_size
        told = f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size // 1000} kB"
        click.echo(f"{out}: {told}, open it in a browser")


def _settings(
    policies: tuple[str, ...], options: dict[str, Any]
) -> list[dict[str, Any]]:
    """The options of each policy. Raises UsageError: what cannot be compared."""
    if len(policies) > 2 or len(set(policies)) < len(policies):
        raise click.UsageError(
            "--policy can be given once, or twice with two names: one text beside "
            "another."
        )
    settings = [{**options, "policy": policy} for policy in policies]
    for setting in settings:
        check(setting)
    return settings


def _check_out(out: Path | None) -> None:
    """Refuse a file that cannot be written, before a text is read."""
    if out is not None and not os.access(out.parent, os.W_OK):
        there = out.parent.is_dir()
        why = "no writing to" if there else "no directory"
        raise click.UsageError(
            f"--out {out}: {why} {out.parent}. Name a file in a directory"
            f"{' of yours' if there else ''}."
        )


def _read(text: str) -> str:
    """The text of a file, if there is one of that name, or the text itself."""
    path = os.path.expanduser(text)
    if text != "-" and os.path.isdir(path):
        raise click.UsageError(f"{text} is a directory. Name a file, or give a text.")
    if text != "-" and os.path.exists(path):
        return read_given(None, Path(path), "TEXT", "text")
    if len(text.split()) == 1 and os.path.splitext(text)[1]:
        click.echo(f"No file {text}: it is read as a text.", err=True)
    return read_given(text, None, "TEXT", "text")


def _table(found: "Inspection") -> str:
    heads = ("setting", "layers", "tokens", "held by all", "by some", "by none")
    lines = [heads, *(_line(record, len(found.ids)) for record in found.records)]
    return table(lines, "<12 >6 >6 >11 >7 >7")


def _line(record: "Record", n: int) -> tuple[object, ...]:
    share = record.share_held()
    none, every = int((share == 0).sum()), int((share > 1 - 1e-6).sum())
    return (record.label, len(record.layers), n, every, n - none - every, none)
