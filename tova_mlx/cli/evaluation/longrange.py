"""tova-mlx eval longrange: summaries, answers and stories over long texts."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...evaluation.lines import read_text
from ...tables import table
from ..models import directory
from ..parameters import TEXT_FILE, Finite
from .figures import percent, pm
from .options import check_settings, evaluation_options, recall_option
from .runner import Evaluation, begin

if TYPE_CHECKING:
    from ...evaluation.longrange import Task
    from ...evaluation.tasks import Example

# Tokens an answer may have: as many as most of the references.
MAX_TOKENS = {"squality": 384, "qasper": 64, "story": 256}
_DATA = {"squality": "squality", "qasper": "qasper", "story": "text"}


@click.command(short_help="Summaries, answers and stories over long texts")
@evaluation_options(sizes=(256, 512, 1024))
@recall_option
@click.option(
    "--task",
    "tasks",
    type=click.Choice(list(MAX_TOKENS)),
    multiple=True,
    help="What is asked; may be given several times.  [default: all with data]",
)
@click.option(
    "--squality",
    metavar="FILE_OR_HUB_ID",
    help="SQuALITY's JSON lines: a file, or owner/name[/FILE.jsonl] on the hub.",
)
@click.option(
    "--qasper",
    metavar="FILE_OR_HUB_ID",
    help="QASPER as L-Eval packs it: a file, or owner/name[/FILE.jsonl] on the hub.",
)
@click.option(
    "--text",
    type=TEXT_FILE,
    help="A text file whose passages the stories go on from.",
)
@click.option(
    "--examples",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Questions or stories per task, from as many documents as can be.",
)
@click.option(
    "--documents",
    type=click.IntRange(min=1),
    help="Take questions from the first so many documents only. What questions on one "
    "document share is read once.  [default: all]",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    help="Tokens of an answer at most, and of a story exactly.  [default: squality "
    "384, qasper 64, story 256]",
)
@click.option(
    "--story-tokens",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="Tokens of a passage that a story goes on from.",
)
@click.option(
    "--temp",
    type=Finite(min=0),
    default=0.7,
    show_default=True,
    help="Sampling temperature of stories; answers and summaries are greedy.",
)
def longrange(as_json: bool, **options: Any) -> None:
    """Summaries (SQuALITY), answers (QASPER) and stories over long texts

    Scored by ROUGE-L, token F1, and the full model's perplexity of a story, which is
    low for one that repeats itself, too: its share of repeated words is a column. Rows
    go to results.jsonl in --out, what was written to answers.jsonl, the figure to
    longrange.png.

    Example: tova-mlx eval longrange --qasper qasper.jsonl --text novel.txt
    --max-kv-size 512 --out results/longrange
    """
    names = _chosen(options)
    check_settings(options)
    from ...evaluation.scores import rouge

    # Before hours of work, not after them.
    if "squality" in names:
        rouge()
    examples = {name: _questions(name, options) for name in names if name != "story"}
    text = read_text(options["text"]) if "story" in names else ""
    path = directory(options["model"])
    from ...evaluation.prompts import Prompts, trained_context

    context = trained_context(path)
    loaded = begin({**options, "model": path}, context=context)
    from ...evaluation.answers import Answers
    from ...evaluation.longrange import LongRange, plot
    from ...evaluation.results import Results
    from ...evaluation.tasks import load_story

    common, tokenizer = loaded.common, loaded.tokenizer
    prompts = Prompts(tokenizer, common["model"], context)
    if text:
        how = (options["examples"], options["story_tokens"], tokenizer)
        examples["story"] = load_story(text, *how)
    tasks = [_task(name, examples[name], prompts, options) for name in names]
    results = Results(options["out"], common, ("model", "dtype"))
    answers = Answers(options["out"], {n: common[n] for n in ("model", "dtype")})
    step = options["prefill_step_size"]
    measured = LongRange(loaded.model, tokenizer, results, answers, step)
    wanted = loaded.settings
    Evaluation(
        "longrange",
        results,
        cost=measured.cost(tasks, wanted),
        measure=lambda *bar: measured.run(tasks, wanted, *bar),
        plot=plot,
        table=_table,
        to_json=lambda rows: {"rows": rows, "answers": str(answers.path)},
    ).run(as_json=as_json)


def _chosen(options: dict[str, Any]) -> list[str]:
    """The tasks to run. Raises UsageError where tasks and data do not agree."""
    given = [name for name in MAX_TOKENS if options[_DATA[name]] is not None]
    chosen = [name for name in MAX_TOKENS if name in options["tasks"]] or given
    if not chosen:
        raise click.UsageError("Give --squality, --qasper or --text, or several.")
    for name in MAX_TOKENS:
        if name in chosen and name not in given:
            raise click.UsageError(f"--task {name} needs --{_DATA[name]}.")
        if name in given and name not in chosen:
            raise click.UsageError(
                f"--{_DATA[name]} is given, but no --task {name} to read it."
            )
    return chosen


def _questions(name: str, options: dict[str, Any]) -> "list[Example]":
    from ...evaluation.tasks import load_qasper, load_squality

    load = load_squality if name == "squality" else load_qasper
    return load(options[name], options["examples"], options["documents"])


def _task(
    name: str, examples: "list[Example]", prompts: Any, options: dict[str, Any]
) -> "Task":
    from ...evaluation.longrange import Task

    max_tokens = options["max_tokens"] or MAX_TOKENS[name]
    made = [prompts.make(name, example, max_tokens) for example in examples]
    cut = [p.cut_tokens for p in made if p.cut_tokens]
    if cut:
        click.echo(
            f"{name}: {len(cut)} of {len(made)} documents do not fit the "
            f"{prompts.context:,} tokens that the model was trained for; "
            f"{sum(cut):,} tokens are cut from their middles.",
            err=True,
        )
    source = options[_DATA[name]]
    local = Path(source).expanduser()
    data = local.name if local.is_file() else source
    drawn = (options["temp"], options["seed"]) if name == "story" else ()
    return Task(name, data, examples, made, max_tokens, *drawn)


def _table(rows: list[dict[str, Any]]) -> str:
    from ...evaluation.plots import line_of

    names = ["full"]
    if any("recall" in row for row in rows):
        names.append("no_recall")
    lines = [
        (
            row["task"],
            row["unit"],
            line_of(row),
            row["max_kv_size"],
            pm(row["value"], row["stderr"], 3),
            *(_to(row, name) for name in names),
            f"{row['repetition']:.1%}" if "repetition" in row else "",
        )
        for row in rows
    ]
    compared = [f"to {name.replace('_', ' ')}" for name in names]
    heads = ("task", "unit", "policy", "size", "value", *compared, "repeated")
    return table([heads, *lines], "<8 <10 <9 >5 >15" + " >16" * len(names) + " >8")


def _to(row: dict[str, Any], name: str) -> str:
    """What a row has of its comparison with `name`, as text."""
    if f"minus_{name}" in row:
        return pm(row[f"minus_{name}"], row[f"minus_{name}_stderr"], 3, "+")
    return percent(row.get(f"ratio_to_{name}"), row.get(f"ratio_to_{name}_stderr"))
