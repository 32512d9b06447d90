"""Options that the evaluations share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ...policies import POLICIES
from ..options import KVBits, UserPath, check_policy, model_option

F = TypeVar("F", bound=Callable[..., Any])

BOUNDED = tuple(name for name in POLICIES if name != "full")


def evaluation_options(sizes: tuple[int, ...]) -> Callable[[F], F]:
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


def quantised_options(command: F) -> F:
    """In which ways keys and values are quantised, beside not at all."""
    for option in reversed(
        [
            click.option(
                "--kv-bits",
                type=KVBits(),
                multiple=True,
                help="Quantised keys and values, too: 4, 8, or a pair like 8,4; may be "
                "given several times. All is measured unquantised as well.",
            ),
            click.option(
                "--kv-group-size",
                "kv_group_sizes",
                type=click.Choice(["32", "64"]),
                multiple=True,
                help="Values that share a scale, with --kv-bits; may be given several "
                "times.  [default: 64]",
            ),
        ]
    ):
        command = option(command)
    return command


def quantised(options: dict[str, Any]) -> list[tuple[tuple[int, int], int]]:
    """Pair the bits with the sizes of groups. Raises UsageError: sizes without bits."""
    bits, groups = options.get("kv_bits", ()), options.get("kv_group_sizes", ())
    if groups and not bits:
        raise click.UsageError("--kv-group-size does nothing without --kv-bits.")
    pairs = [(b, b) if isinstance(b, int) else b for b in bits]
    return [(pair, int(n)) for pair in pairs for n in groups or (64,)]


def check_settings(options: dict[str, Any]) -> None:
    """Refuse now what no model could do, before one is loaded. Raises UsageError."""
    quantised(options)
    for policy in options["policies"]:
        for size in options["sizes"]:
            check_policy(policy, size, {})
