"""Options that the evaluations share."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import click

from ...policies import POLICIES
from ..options import check_policy, model_option
from ..parameters import KVBits, KVSize, UserPath

F = TypeVar("F", bound=Callable[..., Any])

BOUNDED = tuple(name for name in POLICIES if name != "full")


class EvaluatedSize(KVSize):
    """Also a share of the bytes that the full cache takes."""

    name = "TOKENS|BYTES|SHARE"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if not isinstance(value, str) or "/" not in value:
            return super().convert(value, param, ctx)
        try:
            share = Fraction(value)
        except (ValueError, ZeroDivisionError):
            share = Fraction(0)
        if not 0 < share <= 1:
            self.fail(f"{value} is no share such as 1/8.", param, ctx)
        return share


def evaluation_options(
    sizes: tuple[int, ...],
    policies: tuple[str, ...] = BOUNDED,
    *,
    others: tuple[str, ...] = (),
    step: int = 256,
    of_step: str = "the result does not depend on it, with --kv-bits but for what "
    "rounding decides",
    out: str | None = None,
) -> Callable[[F], F]:
    """Model, policies, sizes, step, seed, where results go, `as_json`.

    sizes, policies, step, out: defaults, without `out` it has to be given; others:
    names that count as policies beside ours; of_step: what the step decides.
    """

    # A default of None would count as one.
    where: dict[str, Any] = {"required": True} if out is None else {"default": out}

    def decorate(command: F) -> F:
        for option in reversed(
            [
                model_option,
                click.option(
                    "--policy",
                    "policies",
                    type=click.Choice([*POLICIES, *others]),
                    multiple=True,
                    default=policies,
                    show_default=True,
                    help="Which tokens are kept; may be given several times.",
                ),
                click.option(
                    "--max-kv-size",
                    "sizes",
                    type=EvaluatedSize(),
                    multiple=True,
                    default=sizes,
                    show_default=True,
                    help="Tokens kept per layer; bytes of all caches, such as 64MB, or "
                    "a share of what full takes, such as 1/8, in half precision; may "
                    "be given several times.",
                ),
                click.option(
                    "--prefill-step-size",
                    type=click.IntRange(min=1),
                    default=step,
                    show_default=True,
                    help=f"Tokens read per step; {of_step}.",
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
                    **where,
                    show_default=True,
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
                help="Quantised keys and values, too: 4, 5, 6 or 8, or a pair like "
                "6h,4; may be given several times. All is measured unquantised as "
                "well.",
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


recall_option = click.option(
    "--recall",
    type=click.IntRange(min=1),
    multiple=True,
    help="Slots of --max-kv-size that bring evicted tokens back, a multiple of 16; may "
    "be given several times. All is measured without as well.",
)


def quantised(options: dict[str, Any]) -> list[tuple[Any, int]]:
    """Pair the bits with the sizes of groups. Raises UsageError: sizes without bits."""
    bits, groups = options.get("kv_bits", ()), options.get("kv_group_sizes", ())
    if groups and not bits:
        raise click.UsageError("--kv-group-size does nothing without --kv-bits.")
    if not bits:
        return []
    # Not before: it imports MLX.
    from ...storage.formats import storage_for

    pairs = [storage_for(b, 64).options()["kv_bits"] for b in bits]
    return [(pair, int(n)) for pair in pairs for n in groups or (64,)]


def check_settings(options: dict[str, Any]) -> None:
    """Refuse now what no model could do, before one is loaded. Raises UsageError."""
    quantised(options)
    for policy in options["policies"]:
        for size in options["sizes"]:
            check_policy(policy, size, {})
            for slots in options.get("recall", ()):
                if policy != "full":
                    check_policy(policy, size, {}, slots)
