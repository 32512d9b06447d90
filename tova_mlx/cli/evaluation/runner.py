"""What every evaluation does: load, measure with a bar, draw, print."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ...errors import OptionError, TovaError
from ...evaluation.lines import read_text
from ...evaluation.results import shown
from ...progress import Bar
from ..options import in_options
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
        common = {"text": shown(text.stem), "text_sha256": digest}
    from ...evaluation.budgets import tokens_kept
    from ...evaluation.plots import pyplot

    # Before hours of work, not after them.
    pyplot()
    model, tokenizer, _, own = load_model(options)
    wanted = wanted_settings(options, partial(tokens_kept, model, context=context))
    return Loaded(model, tokenizer, own | common, wanted, written)


def load_model(options: dict[str, Any]) -> tuple[Any, Any, str, dict[str, Any]]:
    """The model of `evaluation_options`, its tokenizer, directory, and what rows say.

    Raises ModelLoadError.
    """
    from ...evaluation.results import provenance
    from ..models import load

    model, tokenizer, path = load(options["model"])
    import mlx.core as mx
    from mlx.utils import tree_flatten

    leaves: Any = tree_flatten(model.parameters())
    floats = [a.dtype for _, a in leaves if mx.issubdtype(a.dtype, mx.floating)]
    dtype = str(max(set(floats), key=floats.count)).rpartition(".")[2]
    common = {
        **provenance(path, dtype, options["seed"]),
        "prefill_step_size": options["prefill_step_size"],
    }
    return model, tokenizer, path, common


def wanted_settings(
    options: dict[str, Any], tokens: "Callable[[Any, Setting], int]"
) -> "list[Setting]":
    """The settings of `evaluation_options`; tokens: how many a size is in a setting.

    Raises UsageError.
    """
    from ...evaluation.results import settings

    try:
        return settings(
            options["policies"],
            options["sizes"],
            quantised(options),
            options.get("recall", ()),
            tokens,
        )
    except OptionError as error:
        raise click.UsageError(in_options(str(error))) from error


@dataclass
class Evaluation:
    """A measurement that goes on where it was, and what is made of it.

    Args:
        name: of the figure.
        results: where the rows go.
        cost: what is to be done, in `unit`s.
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
    unit: str = "tokens"

    def run(self, *, as_json: bool) -> None:
        """Measure what is missing, draw as it goes on, and print all at the end."""
        done: list[Any] = []
        figure = self.results.directory / f"{self.name}.png"
        drawn = time.monotonic()
        try:
            with Bar(self.cost, unit=self.unit) as bar:
                for result in self.measure(bar.advance, bar.say):
                    done.append(result)
                    if time.monotonic() - drawn > _REDRAWN:
                        self.plot(done, figure)
                        drawn = time.monotonic()
        except BaseException:
            # Of a run that was stopped, too; what stopped it is what is said.
            if done:
                with suppress(TovaError):
                    self.plot(done, figure)
            raise
        picture = self.plot(done, figure) if done else None
        if as_json:
            files = {"path": str(self.results.path), "plot": picture and str(picture)}
            click.echo(json.dumps({**self.to_json(done), **files}))
        else:
            click.echo(self.table(done))
