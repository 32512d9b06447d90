"""Options that the evaluations share, and what they begin with."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click

from ...policies import POLICIES
from ..options import UserPath, check_policy, model_option

F = TypeVar("F", bound=Callable[..., Any])

BOUNDED = tuple(name for name in POLICIES if name != "full")


def eval_options(sizes: tuple[int, ...]) -> Callable[[F], F]:
    """Model, policies, sizes (with this default), seed, where results go, `as_json`."""

    def decorate(command: F) -> F:
        for option in reversed(
            [
                model_option,
                click.option(
                    "--policy",
                    "policies",
                    type=click.Choice(list(POLICIES)),
                    multiple=True,
                    default=BOUNDED,
                    show_default=True,
                    help="Which tokens are kept; may be given several times.",
                ),
                click.option(
                    "--max-kv-size",
                    "sizes",
                    type=click.IntRange(min=1),
                    multiple=True,
                    default=sizes,
                    show_default=True,
                    help="Tokens kept per layer; may be given several times.",
                ),
                click.option(
                    "--prefill-step-size",
                    type=click.IntRange(min=1),
                    default=256,
                    show_default=True,
                    help="Tokens read per step; the result does not depend on it.",
                ),
                click.option(
                    "--seed",
                    # Half of MLX's range: an example's number is added to it.
                    type=click.IntRange(0, 2**63 - 1),
                    default=0,
                    show_default=True,
                    help="Seed of what is drawn by chance.",
                ),
                click.option(
                    "--out",
                    type=UserPath(path_type=Path, file_okay=False),
                    required=True,
                    help="Directory for results.jsonl and a PNG; a run that was "
                    "stopped goes on there.",
                ),
                click.option(
                    "--json", "as_json", is_flag=True, help="Print one JSON object."
                ),
            ]
        ):
            command = option(command)
        return command

    return decorate


@contextmanager
def progress(
    length: int, width: int
) -> Iterator[tuple[Callable[[int], None], Callable[..., None]]]:
    """A bar with an ETA on stderr: functions to advance it and to say what is done.

    width: of what will be said, in characters.
    """
    with click.progressbar(length=length, file=sys.stderr, label=" " * width) as bar:

        def say(*what: Any) -> None:
            bar.label = f"{' '.join(map(str, what)):{width}}"

        yield bar.update, say


class Loaded(NamedTuple):
    """What an evaluation begins with; `common`: see `evaluation.results.provenance`."""

    model: Any
    tokenizer: Any
    common: dict[str, Any]


def check_settings(options: dict[str, Any]) -> None:
    """Refuse now what no model could do, before one is loaded. Raises UsageError."""
    for policy in options["policies"]:
        for size in options["sizes"]:
            check_policy(policy, size, {})


def begin(options: dict[str, Any]) -> Loaded:
    """Load the model of `eval_options`. Raises UsageError, ModelLoadError."""
    check_settings(options)
    from ...evaluation.plots import pyplot
    from ...evaluation.results import provenance
    from ..models import load

    # Before hours of work, not after them.
    pyplot()
    model, tokenizer, path = load(options["model"])
    import mlx.core as mx
    from mlx.utils import tree_flatten

    leaves: Any = tree_flatten(model.parameters())
    floats = [a.dtype for _, a in leaves if mx.issubdtype(a.dtype, mx.floating)]
    dtype = str(max(set(floats), key=floats.count)).rpartition(".")[2]
    common = provenance(path, dtype, options["seed"])
    common["prefill_step_size"] = options["prefill_step_size"]
    return Loaded(model, tokenizer, common)


def named(path: Path, text: str) -> dict[str, str]:
    """What rows say of a text: its name, and a hash that tells it from others."""
    return {"text": path.stem, "text_sha256": sha256(text.encode()).hexdigest()[:16]}


def first_ids(tokenizer: Any, text: str, n_tokens: int) -> list[int]:
    """At least the first `n_tokens` tokens, if the text has them, not all of a book."""
    # 16 characters a token are more than any text has; quietly, for the warning about
    # the model's context is not meant for who reads in windows.
    return list(tokenizer.encode(text[: 16 * n_tokens], verbose=False))
