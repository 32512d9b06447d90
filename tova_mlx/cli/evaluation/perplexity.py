"""tova-mlx eval perplexity: language modelling on a long text."""

from pathlib import Path
from typing import Any

import click

from ...tables import table
from ..parameters import TEXT_FILE
from .figures import percent, pm
from .options import evaluation_options, quantised_options, recall_option
from .runner import Evaluation, begin


@click.command(short_help="Perplexity of a long text")
@click.argument("text", type=TEXT_FILE)
@evaluation_options(sizes=(64, 128, 256, 512, 1024))
@quantised_options
@recall_option
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
    results.jsonl in --out, losses beside it, the figure to perplexity.png. What is
    quantised is compared with the same policy and size unquantised, too.

    Example: tova-mlx eval perplexity novel.txt --policy tova --policy fade
    --max-kv-size 256 --max-kv-size 512 --out results/novel
    """
    loaded = begin(options, text, context=options["context"])
    from ...evaluation.perplexity import Perplexity, cut, plot
    from ...evaluation.reading import first_ids
    from ...evaluation.results import Results

    ids = first_ids(loaded.tokenizer, loaded.text, options["tokens"])
    windows = cut(ids, options["context"], options["tokens"])
    read = {"tokens": windows.size, "context": windows.shape[1]}
    same = ("model", "dtype", "text", "text_sha256", "tokens", "context")
    results = Results(options["out"], loaded.common | read, same)
    step = min(options["prefill_step_size"], windows.shape[1])
    measured = Perplexity(results, windows, step)
    wanted = loaded.settings
    Evaluation(
        "perplexity",
        results,
        cost=len(measured.missing(wanted)) * (windows.size - len(windows)),
        measure=lambda *bar: measured.run(loaded.model, wanted, *bar),
        plot=plot,
        table=_table,
    ).run(as_json=as_json)


def _table(rows: list[dict[str, Any]]) -> str:
    from ...evaluation.plots import line_of

    names = ["full", "tova"]
    if any("kv_bits" in row for row in rows):
        names.append("plain")
    lines = [("policy", "size", "perplexity", *(f"to {name}" for name in names))]
    for row in rows:
        value = pm(row["value"], row["stderr"], 2)
        ratios = [
            percent(row.get(f"ratio_to_{name}"), row.get(f"ratio_to_{name}_stderr"))
            for name in names
        ]
        lines.append((line_of(row), row["max_kv_size"], value, *ratios))
    return table(lines, "<9 >5 >16" + " >16" * len(names))
