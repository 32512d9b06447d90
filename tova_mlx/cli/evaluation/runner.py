"""What every evaluation does: load, measure with a bar, draw, print."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ...errors import OptionError
from ...evaluation.lines import read_text
from ..options import in_options
from ..progress import progress_bar
from .options import check_settings, quantised

if TYPE_CHECKING:
    from ...evaluation.results import Results, Setting

# Seconds between figures of a run that is not done.
_REDRAWN = 30


class Loaded(NamedTuple):
    """What an evaluation begins with; `common`: see `evaluation.results.provenance`."""

    model: Any
    tokenizer: Any
    common: dict[str, Any]
    settings: "list[Setting]"
    text: str


def begin(
    options: dict[str, Any], text: Path | None = None, *, context: int | None
) -> Loaded:
    """Read the text if there is one, and load the model of `evaluation_options`.

    context: most tokens that a cache will see, None if not known.

    Raises UsageError, EvaluationError, ModelLoadError.
    """
    check_settings(options)
    common: dict[str, Any] = {}
    written = ""
    if text is not None:
        written = read_text(text)
        digest = sha256(written.encode()).hexdigest()[:16]
        common = {"text": text.stem, "text_sha256": digest}
    from ...evaluation.budgets import tokens_kept
    from ...evaluation.plots import pyplot
    from ...evaluation.results import provenance, settings
    from ..models import load

    # Before hours of work, not after them.
    pyplot()
    model, tokenizer, path = load(options["model"])
    import mlx.core as mx
    from mlx.utils import tree_flatten

    leaves: Any = tree_flatten(model.parameters())
    floats = [a.dtype for _, a in leaves if mx.issubdtype(a.dtype, mx.floating)]
    dtype = str(max(set(floats), key=floats.count)).rpartition(".")[2]
    common = {
        **provenance(path, dtype, options["seed"]),
        "prefill_step_size": options["prefill_step_size"],
        **common,
    }
    tokens = partial(tokens_kept, model, context=context)
    try:
        wanted = settings(
            options["policies"],
            options["sizes"],
            quantised(options),
            options.get("recall", ()),
            tokens,
        )
    except OptionError as error:
        raise click.UsageError(in_options(str(error))) from error
    return Loaded(model, tokenizer, common, wanted, written)


def first_ids(tokenizer: Any, text: str, n_tokens: int) -> list[int]:
    """At least the first `n_tokens` tokens, if the text has them, not all of a book."""
    # 16 characters a token are more than any text has; quietly, for the warning about
    # the model's context is not meant for who reads in windows.
    return list(tokenizer.encode(text[: 16 * n_tokens], verbose=False))


@dataclass
class Evaluation:
    """A measurement that goes on where it was, and what is made of it.

    Args:
        name: of the figure.
        results: where the rows go.
        cost: what is to be done, in the unit of progress.
        measure: gives what is there and what is measured in order, from functions to
            advance the bar and to say what is being done.
        plot: draws all that there is into a file; None if there is nothing to draw.
        table: the same as text.
        to_json: the same as an object, the path of the rows aside.
    """

    name: str
    results: "Results"
    cost: int
    measure: Callable[[Callable[[int], Any], Callable[..., Any]], Iterator[Any]]
    plot: Callable[[list[Any], Path], Path | None]
    table: Callable[[list[Any]], str]
    to_json: Callable[[list[Any]], dict[str, Any]] = field(
        default=lambda rows: {"rows": rows}
    )

    def run(self, *, as_json: bool) -> None:
        """Measure what is missing, draw as it goes on, and print all at the end."""
        done: list[Any] = []
        picture: Path | None = None
        figure = self.results.directory / f"{self.name}.png"
        drawn = time.monotonic()
        try:
            with progress_bar(self.cost) as (advance, say):
                for result in self.measure(advance, say):
                    done.append(result)
                    if time.monotonic() - drawn > _REDRAWN:
                        self.plot(done, figure)
                        drawn = time.monotonic()
        finally:
            # Of a run that was stopped, too.
            if done:
                picture = self.plot(done, figure)
        if as_json:
            files = {"path": str(self.results.path), "plot": picture and str(picture)}
            click.echo(json.dumps({**self.to_json(done), **files}))
        else:
            click.echo(self.table(done))
