"""What a policy is: how it ranks tokens, and which it protects.

The lowest ranked token that is not protected is evicted; ties go to the oldest. A
policy ranks in one of three ways:

- by attention (`reads_attention`), with a score that every step updates:

      score <- memory * score + mean over heads of (weight * norm)

  `norm` is the L2 norm of the token's value in the head's KV head if the policy is
  value-weighted, else 1. A new token starts at 0.
- by a score of its own (`score`), a function of the keys, values and positions held.
- by age, if it has neither: the oldest is evicted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ..errors import OptionError

if TYPE_CHECKING:
    # The command line reads the policies before it needs MLX.
    import mlx.core as mx

    Score: TypeAlias = Callable[[Any, Any, mx.array, mx.array], mx.array]
    ScoreOnGpu: TypeAlias = Callable[[mx.array, mx.array | None], mx.array]
    ScanOnGpu: TypeAlias = Callable[..., mx.array | None]
    Prepare: TypeAlias = Callable[[mx.array, mx.array], tuple[Any, Any]]

Granularity = Literal["layer", "head"]

# Positions are int32, and a cache has a slot more than it holds tokens.
_MOST_TOKENS = 2**31 - 2

# What the user of a policy may be able to set, and what it takes to read it.
POLICY_OPTIONS = ("granularity", "memory", "value_weighted", "n_sinks", "n_recent")
_OF_SCORES = ("granularity", "n_sinks", "n_recent")
_OF_AGE = ("n_sinks",)


@dataclass(frozen=True)
class Rule:
    """A policy with all its options resolved for one `max_size`.

    `max_size` is in tokens, None for no limit. `n_sinks` and `n_recent` count
    protected tokens (first and newest), inside `max_size`. `pinned`: how many of the
    first are so for one conversation's sake.
    """

    policy: str
    max_size: int | None
    reads_attention: bool
    granularity: Granularity
    memory: float
    value_weighted: bool
    n_sinks: int
    n_recent: int
    score: Score | None = None
    prepare: Prepare | None = None
    pinned: int = 0
    score_on_gpu: ScoreOnGpu | None = None
    scan_on_gpu: ScanOnGpu | None = None

    @property
    def by_age(self) -> bool:
        """Whether the oldest is evicted, so that nothing of a token need be known."""
        return not self.reads_attention and self.score is None

    @property
    def per_head(self) -> bool:
        """Whether every KV head evicts a token of its own."""
        return self.granularity == "head"

    def as_dict(self) -> dict[str, Any]:
        """The rule as JSON can hold it; `reads_keys` for a score of its own."""
        others = ("score", "prepare", "pinned", "score_on_gpu", "scan_on_gpu")
        own = {k: v for k, v in vars(self).items() if k not in others}
        return {**own, "reads_keys": self.score is not None}

    def pinning(self, n: int) -> Rule:
        """Return the rule that protects the first n tokens too, or half of them all.

        Where no room is left, fewer of the newest are protected.
        """
        if self.max_size is None:
            return self
        pinned = min(n, self.max_size // 2)
        sinks = max(self.n_sinks, pinned)
        recent = min(self.n_recent, self.max_size - 1 - sinks)
        return replace(self, n_sinks=sinks, n_recent=recent, pinned=pinned)


@dataclass(frozen=True)
class Policy:
    """A rule of which token is evicted; `register_policy` makes it known by its name.

    Args:
        name: what users call it; a letter, then letters, digits, - and _.
        keeps: what it holds on to, in a few words, for tables and help.
        source: the paper.
        options: which of `POLICY_OPTIONS` its users can set; None: all that it can
            read, which depends on how it ranks.
        bounded: False for one that evicts nothing.
        reads_attention: whether it ranks by attention; then `memory` is the share of
            the old score kept per token (0 to 1), and `value_weighted` whether a
            weight counts times the norm of the value.
        granularity: "layer", one victim per layer, or "head", one per KV head.
        n_sinks: first tokens that are protected.
        recent_share: share of `max_size` that is protected as newest, unless the user
            gives `n_recent`.
        score: `score(keys, values, positions, held)`, higher = keep: float32
            [B, n_kv_heads, S] or [B, 1, S]. keys, values: float32 [B, n_kv_heads, S,
            head_dim], as stored; positions: int32, and held: bool, [B, 1, S] or, with
            granularity "head", [B, n_kv_heads, S]. Only the scores of tokens held are
            read, and where one victim is evicted per layer, their mean over the KV
            heads. It is called after every token, with the same result whatever the
            order of the S slots, and must not evaluate anything.
        prepare: `prepare(keys, values)`, two things to be given to `score` in their
            place: what of them is the same whichever tokens are held is then made
            once for a block of a prompt instead of once for every token.
        score_on_gpu: `score_on_gpu(keys, held)`, the same scores of keys that are not
            quantised, of any type, as a Metal kernel, for the steps of generation; held
            is None where every slot holds a token.
        scan_on_gpu: `scan_on_gpu(prepared, positions, rule, first_evicting=, length=)`,
            int32 [B, H', N]: of N keys in order of position, the last `length` of which
            come one a step, the last step that saw each, `length` if it is held; from
            the step `first_evicting` on one goes after every step. `prepared` is the
            first of what `prepare` gave. For blocks of a prompt; nothing is evaluated.
            None for a block that is too wide: `score` is called step by step then.

    Raises:
        OptionError: a combination that means nothing.
    """

    name: str
    keeps: str
    source: str
    options: tuple[str, ...] | None = None
    bounded: bool = True
    reads_attention: bool = False
    granularity: Granularity = "layer"
    memory: float = 0.0
    value_weighted: bool = False
    n_sinks: int = 0
    recent_share: float = 0.0
    score: Score | None = None
    prepare: Prepare | None = None
    score_on_gpu: ScoreOnGpu | None = None
    scan_on_gpu: ScanOnGpu | None = None

    def __post_init__(self) -> None:
        if not self.name.replace("-", "_").isidentifier():
            raise OptionError(
                f"A policy cannot be called {self.name!r}. Use a letter, then letters, "
                "digits, - and _."
            )
        if self.score is not None and self.reads_attention:
            raise OptionError(
                f"{self.name}: a policy ranks by attention or by its own score, not by "
                "both. Leave one of score and reads_attention out."
            )
        if not self.reads_attention and (self.memory or self.value_weighted):
            raise OptionError(
                f"{self.name}: memory and value_weighted say how attention counts, "
                "which it does not read. Leave them out, or set reads_attention=True."
            )
        by_age = self.score is None and not self.reads_attention
        if by_age and (self.granularity != "layer" or self.recent_share):
            raise OptionError(
                f"{self.name}: one that evicts by age does so alike in all heads and "
                "protects no recent tokens. Leave granularity and recent_share out, or "
                "give it a score."
            )
        readable = self._readable
        if self.options is None:
            object.__setattr__(self, "options", readable)
        elif unread := set(self.options) - set(readable):
            raise OptionError(
                f"{self.name} cannot read {', '.join(sorted(unread))}. Options that it "
                f"can offer: {', '.join(readable) or 'none'}."
            )
        if self.bounded:
            # With as much room as there is, so that only the defaults can be wrong.
            self.resolve(_MOST_TOKENS, {})

    @property
    def _readable(self) -> tuple[str, ...]:
        if not self.bounded:
            return ()
        if self.reads_attention:
            return POLICY_OPTIONS
        return _OF_AGE if self.score is None else _OF_SCORES

    def resolve(self, max_size: int | None, options: Mapping[str, Any]) -> Rule:
        """Check `max_size` (tokens) and `options`, and fill in the defaults.

        Raises OptionError for a value that cannot work or an option not read.
        """
        readable = self.options or ()
        for option in options:
            if option not in readable:
                known = ", ".join(readable) or "none"
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
            granularity=options.get("granularity", self.granularity),
            memory=options.get("memory", self.memory),
            value_weighted=options.get("value_weighted", self.value_weighted),
            n_sinks=self._count("n_sinks", options.get("n_sinks", self.n_sinks)),
            n_recent=self._count(
                "n_recent",
                options.get("n_recent", int(self.recent_share * (size or 0))),
            ),
            score=self.score,
            prepare=self.prepare,
            score_on_gpu=self.score_on_gpu,
            scan_on_gpu=self.scan_on_gpu,
        )
        self._check(rule)
        return rule

    def _count(self, option: str, value: Any, at_least: int = 0) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
            raise OptionError(
                f"{self.name}: {option}={value!r} is not a whole number of tokens. "
                f"Use {at_least} or more."
            )
        if value > _MOST_TOKENS:
            raise OptionError(
                f"{self.name}: {option}={value} is more tokens than positions can "
                f"count. Use at most {_MOST_TOKENS}, or policy full for no limit."
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
                f"{self.name}: memory={memory!r} is not a share of the old score to "
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
