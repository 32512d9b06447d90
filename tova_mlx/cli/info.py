"""tova-mlx info: what each layer of a model would get."""

import json
from dataclasses import replace
from typing import Any

import click

from ..tables import table
from .options import cache_arguments, cache_options, check, model_option, settle_size

LENGTHS = (8_192, 32_768, 131_072)


@click.command(short_help="What each layer of a model would get")
@model_option
@cache_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(as_json: bool, **options: Any) -> None:
    """What each layer of a model would get: kind, tokens, bytes

    Example: tova-mlx info --max-kv-size 1024 --policy fade
    """
    check(options)
    from .models import load

    model, _, path = load(options["model"])
    from ..models.conversion import default_bytes, make_prompt_cache
    from ..models.report import Report, describe, trace

    budget = options["max_kv_size"]
    settle_size(model, options)
    caches = make_prompt_cache(
        model,
        **cache_arguments(options),
    )
    rows = describe(trace(model, caches)).rows
    report = Report(
        tuple(replace(r, tokens_held=0, tokens_seen=0, bytes_now=0) for r in rows)
    )
    unbounded = {str(n): default_bytes(model, n) for n in LENGTHS}
    choices = [] if isinstance(budget, int) else _choices(model, options, budget)
    if as_json:
        result = report.to_dict()
        result["path"] = path
        result["unbounded_bytes"] = unbounded
        if choices:
            result["max_kv_size"] = options["max_kv_size"]
            result["choices"] = choices
        click.echo(json.dumps(result))
        return
    click.echo(f"{path}\n{report}")
    most = report.totals["bytes_at_most"]
    lines = [
        (n, f"{size:,}", "" if most is None else f"{size / most:.1f}")
        for n, size in unbounded.items()
    ]
    heads = ("tokens", "bytes unbounded", "" if most is None else "times the bounded")
    click.echo(table([heads, *lines], "> > >"))
    if choices:
        click.echo(_table_of(choices, str(budget)))


def _choices(
    model: Any, options: dict[str, Any], budget: Any
) -> list[dict[str, int | str | float | None]]:
    """How many tokens a budget holds with fewer bits, and what these cost."""
    from ..errors import OptionError
    from ..models.conversion import tokens_within
    from ..storage.formats import BEST, CHANGES

    found: list[dict[str, int | str | float | None]] = []
    for bits in (None, *sorted(BEST, reverse=True)):
        arguments = cache_arguments({**options, "kv_bits": bits})
        del arguments["max_kv_size"]
        try:
            tokens = tokens_within(model, budget, **arguments).tokens
        except OptionError:
            # Of a width that groups of this size do not fit.
            continue
        low, high = CHANGES.get(bits, (None, None)) if bits else (0.0, 0.0)
        stored = None if bits is None else ",".join(map(str, BEST[bits]))
        found.append(
            {
                "kv_bits": bits,
                "keys_values": stored,
                "tokens": tokens,
                "change_percent_from": low,
                "change_percent_to": high,
            }
        )
    return found


def _table_of(choices: list[dict[str, Any]], budget: str) -> str:
    lines = [("--kv-bits", "keys,values", "tokens", "perplexity, measured on 2 models")]
    for choice in choices:
        low, high = choice["change_percent_from"], choice["change_percent_to"]
        changed = "" if low is None else f"{low:+.1f} to {high:+.1f} %"
        bits = choice["kv_bits"]
        lines.append(
            (
                "none" if bits is None else str(bits),
                choice["keys_values"] or "as they come",
                f"{choice['tokens']:,}",
                "–" if bits is None else changed,
            )
        )
    return f"Per layer within {budget}:\n" + table(lines, "< < > >")
