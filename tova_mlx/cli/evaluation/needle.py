"""tova-mlx eval needle: a fact hidden in a text, asked for at its end."""

from itertools import product
from pathlib import Path
from typing import Any

import click

from ...tables import table
from ..parameters import TEXT_FILE, Finite
from .figures import pm
from .options import evaluation_options, quantised_options, recall_option
from .runner import Evaluation, begin


@click.command(short_help="Retrieval of a fact hidden in a text")
@click.option(
    "--text",
    type=TEXT_FILE,
    required=True,
    help="Text file that facts are hidden in, such as a novel.",
)
@evaluation_options(sizes=(256,))
@quantised_options
@recall_option
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
    loaded = begin(options, text, context=max(options["lengths"]))
    from ...evaluation import needle as task
    from ...evaluation.asking import check_template
    from ...evaluation.haystack import Cell, Haystack, draw
    from ...evaluation.results import Results
    from ...evaluation.statistics import scipy_stats

    # Before hours of work, not after them.
    scipy_stats()
    check_template(loaded.tokenizer, loaded.common["model"])
    haystack = Haystack(loaded.text, loaded.tokenizer)
    places = product(options["kinds"], options["lengths"], options["depths"])
    cells = {
        cell: draw(haystack, cell, options["n_cases"], options["seed"])
        for cell in (Cell(*place) for place in places)
    }
    same = ("model", "dtype", "seed", "text", "text_sha256", "cases")
    common = loaded.common | {"cases": options["n_cases"]}
    results = Results(options["out"], common, same)
    measured = task.Needle(results, cells, options["prefill_step_size"])
    wanted = loaded.settings
    Evaluation(
        "needle",
        results,
        cost=measured.to_read(wanted),
        measure=lambda advance, say: measured.run(
            loaded.model, loaded.tokenizer, wanted, advance
        ),
        plot=task.plot,
        table=lambda rows: _table(task.summary(rows)),
        to_json=lambda rows: {"summary": task.summary(rows), "rows": rows},
    ).run(as_json=as_json)


def _table(means: list[dict[str, Any]]) -> str:
    from ...evaluation.plots import line_of

    lines = [
        (
            line_of(row),
            row["max_kv_size"],
            row["kind"],
            f"{row['value']:.2f}",
            "{:.2f}–{:.2f}".format(*row["interval"]),
            pm(row["mean_log_probability"], row["mean_log_probability_stderr"], 2),
            row["n"],
        )
        for row in means
    ]
    heads = ("policy", "size", "kind", "accuracy", "95 %", "log-probability", "cases")
    return table([heads, *lines], "<9 >5 <8 >8 >9 >15 >5")
