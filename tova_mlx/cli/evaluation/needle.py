"""tova-mlx eval needle: a fact hidden in a text, asked for at its end."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import click

from ...evaluation.lines import read_text
from ..options import TEXT_FILE, Finite
from .options import begin, check_settings, eval_options, named, progress


@click.command(short_help="Retrieval of a fact hidden in a text")
@click.option(
    "--text",
    type=TEXT_FILE,
    required=True,
    help="Text file that facts are hidden in, such as a novel.",
)
@eval_options(sizes=(256,))
@click.option(
    "--length",
    "lengths",
    type=click.IntRange(min=1),
    multiple=True,
    default=(512, 1024, 2048),
    show_default=True,
    help="Tokens of text with the fact in it, the question not counted; may be given "
    "several times.",
)
@click.option(
    "--depth",
    "depths",
    type=Finite(0, 1),
    multiple=True,
    default=(0.0, 0.25, 0.5, 0.75, 1.0),
    show_default=True,
    help="Where the fact stands: 0 is the start of the text, 1 its end; may be given "
    "several times.",
)
@click.option(
    "--kind",
    "kinds",
    type=click.Choice(["digits", "sentence"]),
    multiple=True,
    default=("digits", "sentence"),
    show_default=True,
    help="A number of five digits, or something to do in a city; may be given "
    "several times.",
)
@click.option(
    "--cases",
    "n_cases",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Facts and texts per kind, length and depth.",
)
def needle(text: Path, as_json: bool, **options: Any) -> None:
    """Retrieval of a fact hidden in a text, over its depth and the text's length

    Every setting gets the same facts and texts. Rows go to results.jsonl in --out, a
    heat map per setting to needle.png.

    Example: tova-mlx eval needle --text novel.txt --policy vatp --policy tova
    --max-kv-size 256 --length 1024 --out results/needle
    """
    check_settings(options)
    written = read_text(text)
    model, tokenizer, common = begin(options)
    from ...evaluation import needle as task
    from ...evaluation.asking import check_template
    from ...evaluation.haystack import Cell, Haystack, draw
    from ...evaluation.results import Results, settings

    check_template(tokenizer, common["model"])
    common |= {**named(text, written), "cases": options["n_cases"]}
    haystack = Haystack(written, tokenizer)
    cells = {
        cell: draw(haystack, cell, options["n_cases"], options["seed"])
        for cell in (
            Cell(*place)
            for place in product(
                options["kinds"], options["lengths"], options["depths"]
            )
        )
    }
    same = ("model", "dtype", "seed", "text", "text_sha256", "cases")
    results = Results(options["out"], common, same)
    measured = task.Needle(results, cells, options["prefill_step_size"])
    wanted = settings(options["policies"], options["sizes"])
    to_read = measured.to_read(wanted)
    with progress(to_read, 7) as (advance, say):
        say("Reading")
        rows = list(measured.run(model, tokenizer, wanted, advance))
    means = task.summary(rows)
    picture = task.plot(rows, options["out"] / "needle.png")
    if as_json:
        paths = {"path": str(results.path), "plot": str(picture)}
        click.echo(json.dumps({"summary": means, "rows": rows, **paths}))
        return
    click.echo(_table(means))


def _table(means: list[dict[str, Any]]) -> str:
    lines = [
        f"{'policy':10} {'size':>5} {'kind':8} {'accuracy':>8} {'95 %':>9}  "
        f"{'log-probability':>15} {'cases':>5}"
    ]
    for row in means:
        low, high = row["interval"]
        mean = f"{row['mean_log_probability']:.2f}"
        error = row["mean_log_probability_stderr"]
        if error is not None:
            mean += f" ± {error:.2f}"
        lines.append(
            f"{row['policy']:10} {row['max_kv_size'] or '':>5} {row['kind']:8} "
            f"{row['value']:>8.2f} {low:.2f}–{high:.2f}  {mean:>15} {row['n']:>5}"
        )
    return "\n".join(lines)
