"""Hostile files: what is done to bytes, and what may come of reading them.

A `Kind` is a kind of file that the product reads. It makes whole ones once and then one
input after the other, each from the dice of its number, so that a failure is repeated
by kind, number and seed. What comes of an input is an `Outcome`; anything else that is
raised is a failure, as is what `Watch` sees: memory that runs away.
"""

import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from tova_mlx.errors import TovaError

RIGHT, REFUSED = "right", "refused"
# Bytes that an input may take beside a small multiple of its own.
ROOM = 96 << 20
# Of a message, which is one line for people.
LONGEST = 2000


class Outcome(NamedTuple):
    """How an input was mutated, what came of it, and what was said."""

    how: str
    result: str
    said: str = ""


@dataclass
class Kind:
    """A kind of file: `make` in an empty directory, then `try_one` for each input."""

    name: str
    make: Callable[[Path], None]
    try_one: Callable[[random.Random], Outcome]


def refused(how: str, error: BaseException) -> Outcome:
    """The outcome of an error; raises it if it is none that users may see."""
    if not isinstance(error, TovaError):
        raise error
    for cause in causes(error):
        said = str(cause).lower()
        if isinstance(cause, MemoryError) or "alloc" in said:
            raise AssertionError(f"more memory than there is: {said}") from error
    assert len(error.line) < LONGEST, f"an error of {len(error.line)} characters"
    assert error.line.isprintable(), f"an error with {error.line!r}"
    return Outcome(how, REFUSED, error.line)


def causes(error: BaseException | None):
    """An error and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class Watch:
    """Sees how much memory an input takes; `limit`: bytes at most."""

    def __init__(self, limit: int):
        self.limit = limit

    def __enter__(self) -> "Watch":
        mx.clear_cache()
        self._before, self._resident = mx.get_active_memory(), resident()
        mx.reset_peak_memory()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        taken = mx.get_peak_memory() - self._before
        grown = resident() - self._resident
        if kind is None and max(taken, grown) > self.limit:
            raise AssertionError(f"took {taken:,} bytes of MLX and {grown:,} in all")


def resident() -> int:
    """Bytes of this process in memory at most since it was asked last; Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    (line,) = (s for s in status.read_text().splitlines() if s.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return int(line.split()[1]) << 10


def attempt(kind: Kind, number: int, seed: int, size: int = 0) -> tuple[str, Outcome]:
    """Try one input; "right", "refused" or "failed", and the outcome."""
    dice = random.Random(f"{seed} {kind.name} {number}")
    try:
        with Watch(ROOM + 8 * size):
            found = kind.try_one(dice)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        lines = traceback.format_exception(error)
        return "failed", Outcome("", "failed", "".join(lines))
    return found.result, found


# What is done to bytes


def flip(data: bytes, dice: random.Random) -> bytes:
    """One to eight bits, half of them near the beginning."""
    changed = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 8])):
        near = min(len(data), dice.choice([16, 4096, len(data), len(data)]))
        changed[dice.randrange(near)] ^= 1 << dice.randrange(8)
    return bytes(changed)


def cut(data: bytes, dice: random.Random) -> bytes:
    """The end is missing, or the beginning, or a piece of the middle."""
    start, stop = sorted(dice.randrange(len(data) + 1) for _ in range(2))
    parts = [data[:start], data[stop:], data[:start] + data[stop:]]
    return dice.choice([*parts, data[: len(data) - dice.randint(1, 9)]])


def grown(data: bytes, dice: random.Random) -> bytes:
    """More after the end, or in the middle."""
    more = dice.randbytes(dice.choice([1, 8, 1000]))
    at = dice.choice([len(data), dice.randrange(len(data) + 1)])
    return data[:at] + dice.choice([more, bytes(len(more))]) + data[at:]


def overwritten(data: bytes, dice: random.Random) -> bytes:
    """A stretch of zeros, ones or noise."""
    n = dice.choice([1, 4, 8, 64, 512])
    at = dice.randrange(max(1, len(data) - n))
    new = dice.choice([bytes(n), b"\xff" * n, dice.randbytes(n)])
    return data[:at] + new + data[at + n :]


def doubled(data: bytes, dice: random.Random) -> bytes:
    """A stretch stands where another one was."""
    n = dice.randint(1, max(1, len(data) // 2))
    start, at = (dice.randrange(len(data) - n + 1) for _ in range(2))
    return data[:at] + data[start : start + n] + data[at + n :]


def number(data: bytes, dice: random.Random) -> bytes:
    """Eight or four bytes, most of them near the beginning, are another number."""
    n = dice.choice([4, 8])
    numbers = [0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]
    new = (dice.choice(numbers) & (256**n - 1)).to_bytes(n, "little")
    at = dice.choice([0, 8, 16, dice.randrange(max(1, min(len(data), 4096)))])
    return data[:at] + new + data[at + n :]


def spliced(data: bytes, other: bytes, dice: random.Random) -> bytes:
    """The beginning of one file and the end of another."""
    at = dice.randrange(len(data) + 1)
    from_ = dice.choice([at, dice.randrange(len(other) + 1)])
    return data[:at] + other[from_:]


OF_BYTES = (flip, flip, flip, cut, grown, overwritten, doubled, number)


def mutated_bytes(
    data: bytes, others: list[bytes], dice: random.Random
) -> tuple[str, bytes]:
    """How, and the bytes; they differ from those given."""
    while True:
        how = dice.choice([*OF_BYTES, spliced])
        other = dice.choice(others)
        new = spliced(data, other, dice) if how is spliced else how(data, dice)
        if new not in (data, other):
            return how.__name__, new
