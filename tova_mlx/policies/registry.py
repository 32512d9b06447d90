"""The policies by name: those of this package, of installed packages, and registered.

A policy is imported when it is asked for, so that their names cost nothing.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ..errors import OptionError
from .base import Policy, Rule

# What evicted tokens were attended to most is said in blocks of so many neighbours.
RECALL_BLOCK = 16
# Packages name their policies in this group of entry points.
GROUP = "tova_mlx.policies"

# Each in the module of its name, as a constant in capitals.
_BUILT_IN = ("full", "window", "streaming", "h2o", "tova", "vatp", "fade", "keydiff")


class Policies(Mapping[str, Policy]):
    """All policies by name. `register_policy` adds to it."""

    def __init__(self) -> None:
        self._registered: dict[str, Policy] = {}

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys((*_BUILT_IN, *_installed(), *self._registered))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return any(name == known for known in self)

    def __getitem__(self, name: str) -> Policy:
        """Return the policy of this name. Raises OptionError for one that is broken."""
        if name in _BUILT_IN:
            return getattr(import_module(f".{name}", __package__), name.upper())
        if name in self._registered:
            return self._registered[name]
        return _load(_installed()[name])

    def register(self, policy: Policy) -> None:
        if not isinstance(policy, Policy):
            raise OptionError(f"{policy!r} is not a Policy. Give an instance of it.")
        if policy.name in _BUILT_IN:
            raise OptionError(
                f"{policy.name} is a policy of tova_mlx. Give yours another name."
            )
        self._registered[policy.name] = policy


POLICIES = Policies()


def register_policy(policy: Policy) -> Policy:
    """Make a policy known by its name, in this process; returns it.

    It then works wherever a name does. A second one of the same name replaces the
    first, for caches made from then on. To make a policy known in every process, name
    it in the entry points `tova_mlx.policies` of a package.

    Raises OptionError: not a Policy, or the name of one of this package.
    """
    POLICIES.register(policy)
    return policy


def resolve_options(
    policy: str, max_size: int | None, options: Mapping[str, Any], recall: int = 0
) -> Rule:
    """Return the rule for a policy's name, `max_size` in tokens and its options.

    recall: how many of `max_size` are for tokens evicted last, not the rule's.

    Raises OptionError, naming what to do instead.
    """
    if policy not in POLICIES:
        raise OptionError(
            f"policy {policy!r} is not known. Use one of: {', '.join(POLICIES)}."
        )
    _check_recall(policy, max_size, recall)
    if recall and type(max_size) is int:
        max_size -= recall
    return POLICIES[policy].resolve(max_size, options)


def _check_recall(policy: str, max_size: Any, recall: Any) -> None:
    if type(recall) is not int or recall < 0 or recall % RECALL_BLOCK:
        raise OptionError(
            f"{policy}: recall={recall!r} is not a number of slots in blocks of "
            f"{RECALL_BLOCK}. Use 0 for none, or a multiple of {RECALL_BLOCK}."
        )
    if not recall:
        return
    if not POLICIES[policy].bounded:
        raise OptionError(
            f"{policy} evicts nothing that recall={recall} could bring back. Use "
            "recall=0, or another policy."
        )
    if type(max_size) is int and recall >= max_size:
        raise OptionError(
            f"{policy}: recall={recall} leaves the policy none of max_size={max_size} "
            "tokens. Use less, a quarter for example."
        )


@cache
def _installed() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _load(entry: EntryPoint) -> Policy:
    package = entry.dist.name if entry.dist else entry.value
    try:
        policy = entry.load()
    except Exception as error:
        raise OptionError(
            f"policy {entry.name!r} of {package} cannot be loaded ({error}). Repair or "
            "remove that package."
        ) from error
    if not isinstance(policy, Policy) or policy.name != entry.name:
        raise OptionError(
            f"{package} names {entry.value} as policy {entry.name!r}, which is not a "
            "Policy of that name. Repair or remove that package."
        )
    return policy
