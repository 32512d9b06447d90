"""What the checker can find, and the error that carries it."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """Kinds of finding; the runtime reports its own by these values."""

    LINT = "lint"
    COMPILE = "compile"
    LAUNCH = "launch"
    THREADGROUP_MEMORY = "threadgroup memory"
    OUT_OF_BOUNDS = "out of bounds"
    WRITE_TO_INPUT = "write to input"
    UNINITIALISED = "uninitialised read"
    NOT_WRITTEN = "output not written"
    RACE = "race"
    BARRIER = "divergent barrier"
    SIMDGROUP = "divergent simdgroup"
    INACTIVE_LANE = "inactive lane"
    ORDER = "depends on order"
    CRASH = "crash"
    TIMEOUT = "timeout"
    # Not the checker's: what a comparison with a reference says, in seeded.py.
    WRONG = "wrong result"


@dataclass(frozen=True)
class Finding:
    """One thing wrong with a kernel, and the line of its source where known."""

    kind: Kind
    message: str
    where: str = ""

    def __str__(self) -> str:
        place = f" at {self.where}" if self.where else ""
        return f"{self.kind.value}{place}: {self.message}"


class MSLError(Exception):
    """A kernel that is not right Metal, or did something wrong when run."""

    def __init__(self, kernel: str, findings: Sequence[Finding]):
        self.kernel = kernel
        self.findings = list(findings)
        lines = [f"kernel {kernel}:", *(f"  {finding}" for finding in findings)]
        super().__init__("\n".join(lines))
