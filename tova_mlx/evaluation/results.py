"""Rows of an evaluation: one JSON object a line, written as soon as it is known.

A run that was killed goes on where it was: rows that are there are not made again.
"""

import errno
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ..errors import EvaluationError, reason_of
from .lines import Lines
from .rows import ROWS, check

# What `kv_bits` has for keys and for values.
Bits: TypeAlias = tuple[int | str, int | str]


class Setting(NamedTuple):
    """What a row was measured with.

    `max_kv_size` is None for `full`, the bits and the group where nothing is quantised,
    `recall` where nothing is.
    """

    policy: str
    max_kv_size: int | None
    kv_bits: Bits | None = None
    kv_group_size: int | None = None
    recall: int | None = None

    @classmethod
    def of(cls, row: dict[str, Any]) -> "Setting":
        """Read the setting of a row; one that does not name bits is unquantised."""
        bits = row.get("kv_bits")
        return cls(
            row["policy"],
            row["max_kv_size"],
            None if bits is None else tuple(bits),
            row.get("kv_group_size"),
            row.get("recall"),
        )

    @property
    def plain(self) -> "Setting":
        """The same, unquantised."""
        return self._replace(kv_bits=None, kv_group_size=None)

    def to_row(self) -> dict[str, Any]:
        """Name the fields as a row has them: bits and recall only where there are."""
        optional = ("kv_bits", "kv_group_size", "recall")
        fields = self._asdict().items()
        return {k: v for k, v in fields if not (v is None and k in optional)}

    def __str__(self) -> str:
        words = [self.policy]
        if self.max_kv_size is not None:
            words.append(str(self.max_kv_size))
        if self.kv_bits is not None:
            bits = ",".join(map(str, dict.fromkeys(self.kv_bits)))
            words += [f"{bits}-bit", f"g{self.kv_group_size}"]
        if self.recall is not None:
            words.append(f"recall {self.recall}")
        return " ".join(words)


def settings(
    policies: Sequence[str],
    sizes: Sequence[Any],
    quantised: Sequence[tuple[Bits, int]] = (),
    recall: Sequence[int] = (),
    tokens: Callable[[Any, Setting], int] = lambda size, setting: size,
) -> list[Setting]:
    """`full`, then every policy at every size, `tova` before the others.

    quantised: pairs of kv_bits and kv_group_size, in which each is there too, after
    those of its size that are not; `full` only where `policies` has it. recall: slots
    for it, with which each bounded one is there too. tokens: how many a size is in a
    setting.
    """
    named = list(dict.fromkeys(policies))
    bounded = sorted((p for p in named if p != "full"), key=lambda p: p != "tova")
    quantised = list(dict.fromkeys(quantised))
    full = [Setting("full", None, *how) for how in quantised if "full" in named]
    wanted = [
        (size, Setting(policy, None, bits, group, slots))
        for size in dict.fromkeys(sizes)
        for bits, group in [(None, None), *quantised]
        for slots in [None, *dict.fromkeys(recall)]
        for policy in bounded
    ]
    sized = [s._replace(max_kv_size=tokens(size, s)) for size, s in wanted]
    return list(dict.fromkeys([Setting("full", None), *full, *sized]))


def missing(
    settings: Sequence[Setting],
    measured: Callable[[Setting], bool],
    references: Callable[[Setting], Sequence[Setting]],
    saved: Callable[[Setting], bool],
) -> list[Setting]:
    """The settings to measure, in order.

    Those without a row (`measured`), and those that such a row is paired with
    (`references`) without what it takes to pair them (`saved`).
    """
    new = [s for s in settings if not measured(s)]
    paired = {other for s in new for other in references(s)}
    return [s for s in settings if s in new or (s in paired and not saved(s))]


class Results:
    """The rows in a directory's results.jsonl.

    Args:
        directory: made if it is not there.
        common: what all rows of this run say, see `provenance`.
        same: the names among them that a row must share to count as one of this run.

    Raises:
        EvaluationError: the file is there and holds something else.
    """

    def __init__(self, directory: Path, common: dict[str, Any], same: tuple[str, ...]):
        self.directory, self.common = directory, common
        self._key = {name: common[name] for name in same}
        # For files beside the rows that must not be taken for another run's.
        self.name = sha256(json.dumps(self._key).encode()).hexdigest()[:12]
        self.path = directory / "results.jsonl"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lines = Lines(self.path)
            if not os.access(directory, os.W_OK):
                raise PermissionError(errno.EACCES, "it cannot be written to")
            self._rows = list(self._lines)
            for row in self.rows():
                check(row, ROWS)
        except OSError as error:
            raise EvaluationError(
                f"--out {directory}: cannot be used ({error.strerror}). Name a "
                "directory that can be written."
            ) from error
        except ValueError as error:
            raise EvaluationError(
                f"{self.path} holds something that is no row of an evaluation "
                f"({reason_of(error)}). Name another --out, or move it away."
            ) from error

    def rows(self, **values: Any) -> list[dict[str, Any]]:
        """The rows of this run with these values; None is also what is not there."""
        wanted = {**self._key, **values}
        # As JSON gives them back: tuples are lists there.
        wanted = json.loads(json.dumps(wanted))
        return [
            row
            for row in self._rows
            if all(row.get(name) == value for name, value in wanted.items())
        ]

    def add(self, setting: Setting, **values: Any) -> dict[str, Any]:
        """Append a row and have it on the disk when this returns."""
        row = {**self.common, **setting.to_row(), **values}
        self._rows.append(json.loads(self._lines.add(row)))
        return row


def provenance(model: str, dtype: str, seed: int | None) -> dict[str, Any]:
    """What it takes to repeat a run. model: the directory that it was loaded from."""
    return {
        "model": shown(Path(model).name),
        "dtype": dtype,
        "seed": seed,
        **circumstances(Path(sys.argv[0]).name),
    }


def shown(name: str) -> str:
    """The name of a file as text: a figure cannot show bytes that are none."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def circumstances(program: str) -> dict[str, Any]:
    """Of a run of a program with this process's arguments: versions, device, date.

    Of files outside the working directory the command has the names.
    """
    import mlx.core as mx

    arguments = [
        Path(a).name if Path(a).is_absolute() or ".." in Path(a).parts else a
        for a in sys.argv[1:]
    ]
    return {
        "versions": {p: version(p) for p in ("tova_mlx", "mlx", "mlx-lm")},
        "device": f"{mx.default_device()} {platform.machine()} {platform.system()}",
        "command": f"{program} {shlex.join(arguments)}".rstrip(),
        "date": time.strftime("%Y-%m-%d"),
    }
