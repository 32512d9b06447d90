"""Bugs put into kernels on purpose: does the checker find them?

A bug is a change of the text of a working kernel and the kinds of finding that must
come of it. Every bug also runs in the fast build, which sees little more than the
numbers: that shows what the checker is for.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from .findings import Finding, Kind, MSLError
from .kernel import checked_kernels

Sources = Mapping[str, str]
# From sources and a bug's settings to a function from a case's inputs to an array.
MakeKernel = Callable[..., Callable[..., mx.array]]


@dataclass(frozen=True)
class Bug:
    """A change of a kernel's sources.

    Attributes:
        old, new: replaced once, in the first of the sources that has it.
        expected: kinds that the first finding may have; none: nothing may be found.
        more: further (old, new).
        settings: for `make_kernel`.
    """

    name: str
    old: str
    new: str
    expected: tuple[Kind, ...]
    more: tuple[tuple[str, str], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def applied(self, sources: Sources) -> dict[str, str]:
        changed = dict(sources)
        for old, new in ((self.old, self.new), *self.more):
            where = next((key for key in changed if old in changed[key]), None)
            assert where, f"{self.name}: {old!r} is not in the kernel"
            changed[where] = changed[where].replace(old, new, 1)
        return changed


@dataclass(frozen=True)
class Case:
    """Inputs of a kernel, and what it must make of them."""

    inputs: Sequence[Any]
    expected: np.ndarray[Any, Any]


@dataclass(frozen=True)
class Outcome:
    """What was found of a bug, in the checked and in the fast build."""

    bug: Bug
    found: tuple[Finding, ...]
    fast: tuple[Finding, ...]

    @property
    def as_expected(self) -> bool:
        # What follows the first finding is often only its consequence.
        if not self.found:
            return not self.bug.expected
        return self.found[0].kind in self.bug.expected


def outcomes(
    make_kernel: MakeKernel,
    sources: Sources,
    bugs: Iterable[Bug],
    cases: Sequence[Case],
) -> Iterator[Outcome]:
    """Run every bug on the cases, each with other orders of the threads."""
    for bug in bugs:
        yield Outcome(
            bug,
            found=_findings(make_kernel, bug, sources, cases, checked=True),
            fast=_findings(make_kernel, bug, sources, cases, checked=False),
        )


def table(results: Iterable[Outcome]) -> str:
    """A line per bug: what the fast build and what the checker find first."""
    lines = [f"{'bug':44} {'fast build':20} checker"]
    for result in results:
        said = str(result.found[0]) if result.found else "nothing"
        fast = result.fast[0].kind.value if result.fast else "nothing"
        mark = "" if result.as_expected else "NOT AS EXPECTED: "
        lines.append(f"{result.bug.name:44} {fast:20} {mark}{said:.110}")
    return "\n".join(lines)


def _findings(
    make_kernel: MakeKernel,
    bug: Bug,
    sources: Sources,
    cases: Sequence[Case],
    checked: bool,
) -> tuple[Finding, ...]:
    """Of the first case that has any."""
    with checked_kernels(checked=checked):
        kernel = make_kernel(bug.applied(sources), **bug.settings)
    for i, case in enumerate(cases):
        try:
            with checked_kernels(checked=checked, seed=2 * i):
                result = np.array(kernel(*case.inputs))
        except MSLError as error:
            return tuple(error.findings)
        if not np.array_equal(result, case.expected):
            message = f"{result.tolist()} and not {case.expected.tolist()}"
            return (Finding(Kind.WRONG, message),)
    return ()
