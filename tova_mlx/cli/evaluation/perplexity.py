"""tova-mlx eval perplexity: language modelling on a long text."""

import json
from pathlib import Path
from typing import Any

import click

from ...evaluation.lines import read_text
from ..options import TEXT_FILE
from .options import (
    begin,
    check_settings,
    eval_options,
    first_ids,
    named,
    progress,
)
from .tables import percent, pm


@click.command(short_help="Perplexity of a long text")
@click.argument("text", type=TEXT_FILE)
@eval_options(sizes=(64, 128, 256, 512, 1024))
@click.option(
    "--tokens",
    type=click.IntRange(min=2),
    default=20480,
    show_default=True,
    help="Tokens read of the text.",
)
@click.option(
    "--context",
    type=click.IntRange(min=2),
    default=2048,
    show_default=True,
    help="Tokens per window; each is read from an empty cache.",
)
def perplexity(text: Path, as_json: bool, **options: Any) -> None:
    """Perplexity of a long text, every policy at every size on the same tokens

    The text is read token by token in effect, at prefill speed. Rows go to
    results.jsonl in --out, losses beside it, the figure to perplexity.png.

    Example: tova-mlx eval perplexity novel.txt --policy tova --policy fade
    --max-kv-size 256 --max-kv-size 512 --out results/novel
    """
    check_settings(options)
    written = read_text(text)
    model, tokenizer, common = begin(options)
    from ...evaluation.perplexity import Perplexity, cut, plot
    from ...evaluation.results import Results, settings

    ids = first_ids(tokenizer, written, options["tokens"])
    windows = cut(ids, options["context"], options["tokens"])
    common |= {
        **named(text, written),
        "tokens": windows.size,
        "context": windows.shape[1],
    }
    same = ("model", "dtype", "text", "text_sha256", "tokens", "context")
    results = Results(options["out"], common, same)
    step = min(options["prefill_step_size"], windows.shape[1])
    measured = Perplexity(results, windows, step)
    wanted = settings(options["policies"], options["sizes"])
    to_read = len(measured.missing(wanted)) * (windows.size - len(windows))
    rows = []
    with progress(to_read, 15) as (advance, say):
        for row in measured.run(model, wanted, advance, say):
            rows.append(row)
            plot(rows, options["out"] / "perplexity.png")
    if as_json:
        click.echo(json.dumps({"rows": rows, "path": str(results.path)}))
        return
    click.echo(_table(rows))


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'policy':10} {'size':>5} {'perplexity':>17} {'to full':>17} to tova"]
    for row in rows:
        size = row["max_kv_size"] or ""
        value = pm(row["value"], row["stderr"], 2)
        ratios = [
            percent(row.get(f"ratio_to_{name}"), row.get(f"ratio_to_{name}_stderr"))
            for name in ("full", "tova")
        ]
        line = f"{row['policy']:10} {size:>5} {value:>17} {ratios[0]:>17} {ratios[1]}"
        lines.append(line.rstrip())
    return "\n".join(lines)
