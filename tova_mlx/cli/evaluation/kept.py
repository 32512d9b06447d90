"""tova-mlx eval kept: which tokens each policy keeps while a text is read."""

from pathlib import Path
from typing import Any

import click

from ...evaluation.kinds import ENOUGH
from ...tables import table
from ..parameters import TEXT_FILE
from .options import evaluation_options, quantised_options, recall_option
from .runner import Evaluation, begin


@click.command(short_help="Which tokens are kept")
@click.argument("text", type=TEXT_FILE)
@evaluation_options(sizes=(128, 512))
@quantised_options
@recall_option
@click.option(
    "--tokens",
    type=click.IntRange(min=2),
    default=2048,
    show_default=True,
    help="Tokens read of the text.",
)
def kept(text: Path, as_json: bool, **options: Any) -> None:
    """Which tokens are kept: how recent, the first ones, and of which kinds

    Per layer, while TEXT is read token by token in effect, at prefill speed: the share
    of the newest --max-kv-size tokens among those kept, how long the first four stay,
    and the mean lifetime of each kind of token in steps. Kinds (punctuation, numbers,
    proper nouns, possessives, function words) are told by plain rules for English,
    not by a parser. Rows go to results.jsonl in --out, the figure to kept.png.

    Example: tova-mlx eval kept novel.txt --policy tova --policy h2o
    --max-kv-size 256 --out results/kept
    """
    loaded = begin(options, text, context=options["tokens"])
    from ...evaluation.kept import Kept, first_tokens, plot
    from ...evaluation.kinds import token_kinds
    from ...evaluation.reading import first_ids
    from ...evaluation.results import Results
    from ...evaluation.statistics import scipy_stats

    # Before hours of work, not after them.
    scipy_stats()
    wanted = loaded.settings
    ids = first_ids(loaded.tokenizer, loaded.text, options["tokens"])
    ids = first_tokens(ids, options["tokens"], wanted)
    same = ("model", "dtype", "text", "text_sha256", "tokens")
    results = Results(options["out"], loaded.common | {"tokens": len(ids)}, same)
    kinds = token_kinds(loaded.tokenizer, ids)
    measured = Kept(results, ids, kinds, options["prefill_step_size"])
    Evaluation(
        "kept",
        results,
        cost=len(measured.missing(wanted)) * len(ids),
        measure=lambda *bar: measured.run(loaded.model, wanted, *bar),
        plot=plot,
        table=_table,
        to_json=lambda settings: {"rows": [row for rows in settings for row in rows]},
    ).run(as_json=as_json)


def _table(settings: list[list[dict[str, Any]]]) -> str:
    first = settings[0][0]
    counts = ", ".join(f"{n} {kind}" for kind, n in first["counts"].items())
    notes = [
        f"{first['tokens']} tokens read: {counts}",
        "recent: of the tokens kept, the share of the newest max_kv_size seen (from – "
        "to: layers); half: of the newest half as many",
        "first token: share of layers and heads that keep it to the end, else steps",
        f"longest: lifetimes of kinds of {ENOUGH} tokens or more, times all tokens'",
        "",
    ]
    heads = ("policy", "size", "recent", "from – to", "half", "first token", "longest")
    lines = [heads, *(_line(rows) for rows in settings)]
    return "\n".join([*notes, table(lines, "<9 >5 >6 >10 >4 <20 <")])


def _line(rows: list[dict[str, Any]]) -> tuple[object, ...]:
    from ...evaluation.plots import line_of

    policy, size = line_of(rows[0]), rows[0]["max_kv_size"]
    if size is None:
        return (policy, "", "", "", "", "everything is kept", "")
    shares = [row["value"] for row in rows]
    return (
        policy,
        size,
        _percent(_mean(shares)),
        f"{100 * min(shares):.0f} – {100 * max(shares):.0f} %",
        _percent(_mean([row["share_newest_half"] for row in rows])),
        _first_token(rows),
        _longest(rows),
    )


def _first_token(rows: list[dict[str, Any]]) -> str:
    stays = _mean([row["first_tokens_stay"][0] for row in rows])
    if stays == 1:
        return "to the end"
    # Of those that lose it only.
    steps = _mean([row["first_token_steps"] for row in rows])
    lost = (steps - stays * rows[0]["tokens"]) / (1 - stays)
    return f"{_percent(stays)}, else {lost:.0f}" if stays else f"{lost:.0f} steps"


def _longest(rows: list[dict[str, Any]]) -> str:
    from ...evaluation.kept import relative

    counts = rows[0]["counts"]
    ratios = relative([row["lifetimes"] for row in rows])
    enough = {k: r for k, r in ratios.items() if counts[k] >= ENOUGH}
    if not enough or max(enough.values()) - min(enough.values()) < 0.005:
        return "all alike"
    longest = sorted(enough, key=lambda kind: -enough[kind])[:3]
    return ", ".join(f"{kind} {enough[kind]:.2f}" for kind in longest)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
