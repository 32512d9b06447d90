"""tova-mlx info: what each layer of a model would get."""

import json
from dataclasses import replace
from typing import Any

import click

from ..tables import table
from .options import cache_arguments, cache_options, check, model_option

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
    from mlx_lm.models.cache import make_prompt_cache as make_default

    from ..models.conversion import make_prompt_cache
    from ..models.report import Report, bytes_per_token, describe, trace

    caches = make_prompt_cache(
        model,
        **cache_arguments(options),
    )
    rows = describe(trace(model, caches)).rows
    report = Report(
        tuple(replace(r, tokens_held=0, tokens_seen=0, bytes_now=0) for r in rows)
    )
    per_token = bytes_per_token(trace(model, make_default(model)))
    unbounded = {str(n): n * per_token for n in LENGTHS}
    if as_json:
        result = report.to_dict()
        result["path"] = path
        result["unbounded_bytes"] = unbounded
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
