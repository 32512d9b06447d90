"""Options that several commands share."""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from ..errors import OptionError
from ..policies import POLICIES, POLICY_OPTIONS, resolve_options
from .parameters import Bytes, Finite, KVBits, KVSize, PolicyName, UserPath

F = TypeVar("F", bound=Callable[..., Any])


def model_option(command: F) -> F:
    return click.option(
        "--model",
        metavar="PATH_OR_HUB_ID",
        help="Directory or hub id of an mlx-lm model; 'demo' is the small model that "
        "scripts/demo.sh prepares.  [default: demo if it is there, else mlx-lm's]",
    )(command)


_policy_option = click.option(
    "--policy",
    type=PolicyName(),
    default="tova",
    show_default=True,
    help="Which tokens are kept.",
)


def cache_options(
    command: F,
    positions: str = "original",
    size: int = 1024,
    policy: Callable[[F], F] = _policy_option,
) -> F:
    """The options that decide what a layer keeps.

    positions, size: their defaults; policy: the option of that name.
    """
    for option in reversed(
        [
            policy,
            click.option(
                "--max-kv-size",
                type=KVSize(),
                default=size,
                show_default=True,
                help="Tokens kept per layer; or bytes for all caches together, such "
                "as 2GB or 512MiB; or auto, what the machine can spare.",
            ),
            click.option(
                "--granularity",
                type=click.Choice(["layer", "head"]),
                help="One victim per layer or per KV head.  [default: the policy's]",
            ),
            click.option(
                "--n-sinks",
                type=click.IntRange(min=0),
                help="First tokens protected.  [default: the policy's]",
            ),
            click.option(
                "--n-recent",
                type=click.IntRange(min=0),
                help="Newest tokens protected.  [default: the policy's]",
            ),
            click.option(
                "--memory",
                type=Finite(0, 1),
                help="Share of the old score kept per token.  [default: the policy's]",
            ),
            click.option(
                "--value-weighted/--no-value-weighted",
                default=None,
                help="Weigh attention by the norm of the value.  "
                "[default: the policy's]",
            ),
            click.option(
                "--kv-bits",
                type=KVBits(),
                help="Quantised keys and values: 4, 5, 6 or 8, or a pair like 6h,4; h: "
                "keys centred and turned first, as a number alone has it.  "
                "[default: as the model has them]",
            ),
            click.option(
                "--kv-group-size",
                type=click.Choice(["32", "64"]),
                default="64",
                show_default=True,
                callback=lambda ctx, parameter, value: int(value),
                help="Values that share a scale, with --kv-bits.",
            ),
            click.option(
                "--recall",
                type=click.IntRange(min=0),
                default=0,
                show_default=True,
                help="How many of --max-kv-size hold what was evicted last, on its way "
                "to an archive that is attended to, a multiple of 16; 0: what is "
                "evicted is lost.",
            ),
            click.option(
                "--archive",
                type=UserPath(file_okay=False),
                help="Directory for what is evicted, with --recall; deleted at the end."
                "  [default: in memory]",
            ),
            click.option(
                "--archive-limit",
                type=Bytes(),
                help="Bytes that --archive may take, such as 8GB; the oldest tokens "
                "go.  [default: no limit]",
            ),
            click.option(
                "--archive-full",
                type=click.Choice(["stop", "forget"]),
                help="When --archive cannot be written: stop, or go on without what is "
                "evicted from then on.  [default: stop]",
            ),
            click.option(
                "--prefill",
                type=click.Choice(["stepwise", "once"]),
                default="stepwise",
                show_default=True,
                help="Exact token by token, or one cut per chunk (depends on "
                "--prefill-step-size).",
            ),
            click.option(
                "--positions",
                type=click.Choice(["original", "compact", "auto"]),
                default=positions,
                show_default=True,
                help="Those at which tokens were read; or of the tokens held, numbered "
                "anew every 256; or the latter from where the model's range ends.",
            ),
        ]
    ):
        command = option(command)
    return command


pin_option = click.option(
    "--pin-system/--no-pin-system",
    default=True,
    show_default=True,
    help="Keep the system prompt whatever the policy; at most half of the tokens held.",
)


def sampling_options(command: F) -> F:
    """How a prompt is read and tokens are chosen; mlx-lm's words and meanings."""
    for option in reversed(
        [
            click.option(
                "--prefill-step-size",
                type=click.IntRange(min=1),
                default=2048,
                show_default=True,
                help="Tokens of the prompt per step.",
            ),
            click.option(
                "--max-tokens",
                type=click.IntRange(min=1),
                default=256,
                show_default=True,
                help="Tokens to generate at most.",
            ),
            click.option(
                "--temp",
                type=Finite(min=0),
                default=0.0,
                show_default=True,
                help="Sampling temperature; 0 takes the likeliest token.",
            ),
            click.option(
                "--top-p",
                type=Finite(0, 1),
                default=1.0,
                show_default=True,
                help="Sample among the likeliest tokens of this share.",
            ),
            click.option(
                "--seed",
                type=click.IntRange(0, 2**64 - 1),
                default=0,
                show_default=True,
                help="Seed of the sampling.",
            ),
        ]
    ):
        command = option(command)
    return command


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The policy's options that were given on the command line."""
    return {k: options[k] for k in POLICY_OPTIONS if options[k] is not None}


def check(options: dict[str, Any]) -> None:
    """Refuse what no model could do, before one is loaded. Raises UsageError."""
    policy = options["policy"]
    if options["prefill"] == "once" and not POLICIES[policy].reads_attention:
        raise click.UsageError(
            f"{policy} does not read --prefill once: it cuts by attention. Leave it "
            "out."
        )
    recall = options["recall"]
    if recall and options["prefill"] == "once":
        raise click.UsageError(
            "--recall needs --prefill stepwise: what is archived would depend on "
            "--prefill-step-size."
        )
    if recall and options["positions"] == "compact":
        raise click.UsageError(
            "--recall brings tokens back to the positions that they had, which "
            "--positions compact gives to others. Use --positions original."
        )
    if options["archive"] and not recall:
        raise click.UsageError("--archive does nothing without --recall.")
    for name in ("archive_limit", "archive_full"):
        if options[name] is not None and not options["archive"]:
            raise click.UsageError(f"{_flag(name)} does nothing without --archive.")
    check_policy(policy, options["max_kv_size"], given(options), recall)


def check_policy(
    policy: str, max_kv_size: Any, options: Mapping[str, Any], recall: int = 0
) -> None:
    """Refuse a size or options that the policy cannot work with. Raises UsageError."""
    if not isinstance(max_kv_size, int):
        # How many tokens it is depends on the model.
        max_kv_size = 2**30
    try:
        resolve_options(policy, max_kv_size, options, recall)
    except OptionError as error:
        raise click.UsageError(in_options(str(error))) from error


_NAMES = "|".join(
    (
        "max_size",
        "max_kv_size",
        "prefill",
        "positions",
        "kv_bits",
        "kv_group_size",
        "recall",
        *POLICY_OPTIONS,
    )
)
# With a value; and without one, in a list of options or in "Leave kv_bits out".
_GIVEN = re.compile(rf"(?:^|(?<= ))({_NAMES})=(?:'([^']*)'|(\w[\w./]*\b))")
_PAIR = re.compile(r"kv_bits=\((?:'(\w+)'|(\w+)), (?:'(\w+)'|(\w+))\)")
_NAMED = re.compile(rf"(?<=[:,] )({_NAMES})(?=[,.])|(?<=[Ll]eave )kv_bits")


def in_options(message: str) -> str:
    """An error's text with options for the arguments of Python that it names."""
    message = _PAIR.sub(r"kv_bits=\1\2,\3\4", message)
    message = _GIVEN.sub(lambda found: _typed(found[1], found[2] or found[3]), message)
    return _NAMED.sub(lambda found: _flag(found[0]), message)


def _typed(name: str, value: str) -> str:
    if name == "value_weighted":
        return _flag(name if value == "True" else "no_value_weighted")
    return f"{_flag(name)} {value}"


def _flag(name: str) -> str:
    return "--" + ("max_kv_size" if name == "max_size" else name).replace("_", "-")


def settle_size(
    model: Any,
    options: dict[str, Any],
    *,
    parts: int = 1,
    each: str = "conversations",
    **others: Any,
) -> int | None:
    """Put the tokens per layer in the place of a budget, and say how many they are.

    parts, each: how many sets of caches share the budget, and what each is; others:
    arguments of `make_prompt_cache` that are not among the options. Returns the budget
    in bytes, if there is one. Raises UsageError: too small.
    """
    budget = options["max_kv_size"]
    if isinstance(budget, int):
        return None
    from ..models.conversion import tokens_within

    arguments = cache_arguments(options) | others
    del arguments["max_kv_size"]
    how: dict[str, Any] = {"parts": parts, "each": each}
    if "prefill_step_size" in options:
        how["step"] = options["prefill_step_size"]
    try:
        found = tokens_within(model, budget, **how, **arguments)
    except OptionError as error:
        raise click.UsageError(in_options(str(error))) from error
    click.echo(f"--max-kv-size {found.line}", err=True)
    options["max_kv_size"] = found.tokens
    return found.nbytes


def cache_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """The options of `cache_options` as arguments of `make_prompt_cache`."""
    names = (
        "max_kv_size",
        "policy",
        "prefill",
        "kv_bits",
        "kv_group_size",
        "positions",
        "recall",
    )
    arguments = {k: options[k] for k in names} | given(options)
    if options["archive"]:
        from ..caches.options import ArchiveOptions

        forgets = options["archive_full"] == "forget"
        limit = options["archive_limit"]
        arguments["archive"] = ArchiveOptions(options["archive"], limit, forgets)
    return arguments
