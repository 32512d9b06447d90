"""What a policy is: the constants of one recurrence, and which tokens it protects.

Policies that read attention rank every held token by a score, higher = keep, which
each step updates:

    score <- memory * score + mean over heads of (weight * norm)

`norm` is the L2 norm of the token's value in the head's KV head if the policy is
value-weighted, else 1. A new token starts at 0. The token with the lowest score that
is not protected leaves; ties go to the oldest. A policy that reads no attention ranks
all tokens alike, so the oldest unprotected token leaves; one that reads the keys ranks
them by their likeness (`eviction.keys`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, Literal

from ..errors import OptionError

Granularity = Literal["layer", "head"]

# Positions are int32, and a cache has a slot more than it keeps tokens.
_MOST = 2**31 - 2

ATTENTION_OPTIONS = ("granularity", "memory", "value_weighted", "n_sinks", "n_recent")


@dataclass(frozen=True)
class Rule:
    """A policy with all its options settled for one `max_size`.

    `max_size` is in tokens, None for no limit. `n_sinks` and `n_recent` count
    protected tokens (first and newest), inside `max_size`.
    """

    policy: str
    max_size: int | None
    reads_attention: bool
    granularity: Granularity
    memory: float
    value_weighted: bool
    n_sinks: int
    n_recent: int
    reads_keys: bool = False

    @property
    def by_age(self) -> bool:
        """Whether the oldest leaves, so that nothing of a token need be known."""
        return not (self.reads_attention or self.reads_keys)

    @property
    def per_head(self) -> bool:
        """Whether every KV head chooses its own victim."""
        return self.granularity == "head"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Policy:
    """The defaults of a policy and the options it reads.

    `recent_share` is the share of `max_size` that is protected as recent when
    `n_recent` is not given.
    """

    name: str
    keeps: str
    source: str
    options: tuple[str, ...] = ()
    bounded: bool = True
    reads_attention: bool = False
    reads_keys: bool = False
    granularity: Granularity = "layer"
    memory: float = 0.0
    value_weighted: bool = False
    n_sinks: int = 0
    recent_share: float = 0.0

    def settle(self, max_size: int | None, options: Mapping[str, Any]) -> Rule:
        """Check `max_size` (tokens) and `options`, and fill in the defaults.

        Raises OptionError for a value that cannot work or an option not read.
        """
        for option in options:
            if option not in self.options:
                known = ", ".join(self.options) or "none"
                raise OptionError(
                    f"{self.name} does not read {option}={options[option]!r}. "
                    f"Leave it out; the options of {self.name}: {known}."
                )
        if not self.bounded:
            if max_size is not None:
                self._count("max_size", max_size, at_least=1)
            size = None
        else:
            size = self._count("max_size", max_size, at_least=1)
        rule = Rule(
            policy=self.name,
            max_size=size,
            reads_attention=self.reads_attention,
            reads_keys=self.reads_keys,
            granularity=options.get("granularity", self.granularity),
            memory=options.get("memory", self.memory),
            value_weighted=options.get("value_weighted", self.value_weighted),
            n_sinks=self._count("n_sinks", options.get("n_sinks", self.n_sinks)),
            n_recent=self._count(
                "n_recent",
                options.get("n_recent", int(self.recent_share * (size or 0))),
            ),
        )
        self._check(rule)
        return rule

    def _count(self, option: str, value: Any, at_least: int = 0) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
            raise OptionError(
                f"{self.name}: {option}={value!r} is not a whole number of tokens. "
                f"Use {at_least} or more."
            )
        if value > _MOST:
            raise OptionError(
                f"{self.name}: {option}={value} is more tokens than positions can "
                f"count. Use at most {_MOST}, or policy full for no limit."
            )
        return value

    def _check(self, rule: Rule) -> None:
        if rule.granularity not in ("layer", "head"):
            raise OptionError(
                f"{self.name}: granularity={rule.granularity!r} is not known. "
                "Use 'layer' or 'head'."
            )
        memory = rule.memory
        if (
            isinstance(memory, bool)
            or not isinstance(memory, int | float)
            or not isfinite(memory)
            or not 0 <= memory <= 1
        ):
            raise OptionError(
                f"{self.name}: memory={memory!r} is no share of the old score to "
                "keep. Use a number from 0 to 1."
            )
        if not isinstance(rule.value_weighted, bool):
            raise OptionError(
                f"{self.name}: value_weighted={rule.value_weighted!r} is neither "
                "True nor False. Use one of them."
            )
        protected = rule.n_sinks + rule.n_recent
        if rule.max_size is not None and rule.max_size < protected + 1:
            counts = {"n_sinks": rule.n_sinks, "n_recent": rule.n_recent}
            given = " and ".join(f"{k}={v}" for k, v in counts.items() if v)
            raise OptionError(
                f"{self.name}: max_size={rule.max_size} leaves no room after {given}. "
                f"Use at least {protected + 1}, or protect fewer tokens."
            )
