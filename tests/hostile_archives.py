"""Archives on disk: changed under a cache that uses them, or left where one is made.

What is changed before it is read, or read for a save, must be an error: never other
rows. A block that was whole when it was first read is not checked for every token, so
what is changed after that comes back changed. A directory that is given for an archive
may hold anything, and nothing that is not of an archive may be lost in it.
"""

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from hostile import RIGHT, Kind, Outcome, mutated_bytes, refused
from machine import Setup, World

from tova_mlx.caches.options import ArchiveOptions
from tova_mlx.errors import CacheStateError, TovaError
from tova_mlx.models.archives import archive_on_disk
from tova_mlx.storage.log_directory import LogDirectory
from tova_mlx.storage.row_log import BLOCK, MAGIC

SETUPS = [
    Setup("tova", 5, recall=16, archived=32),
    Setup("tova", 5, recall=32, kv_bits=8, archived=64),
    Setup(
        "fade", 6, (("n_recent", 2), ("granularity", "head")), recall=16, archived=32
    ),
    Setup("streaming", 7, recall=16, archived=16),
]


class InUse:
    """A world's archive is changed, and taken into memory, as for a save."""

    def make(self, place: Path) -> None:
        self.place = place
        self.whole = [list(self.outputs(setup, lambda: None)) for setup in SETUPS]

    def outputs(self, setup: Setup, change: Any) -> Any:
        """Outputs before a change and after it."""
        shutil.rmtree(self.place / "a", ignore_errors=True)
        world = World(setup)
        archive_on_disk(world.caches, ArchiveOptions(str(self.place / "a")))
        forward(world, 3 * BLOCK)
        yield forward(world, 1)
        change()
        for cache in world.caches:
            # Reads all rows, as a save does.
            cache.archive_on(None)
        yield forward(world, 2)

    def try_one(self, dice: random.Random) -> Outcome:
        i = dice.randrange(len(SETUPS))
        how = []

        def damage() -> None:
            files = sorted((self.place / "a").glob("*/*.rows"))
            how.append(change(dice.choice(files), dice.choice(files), dice))

        try:
            got = list(self.outputs(SETUPS[i], damage))
        except CacheStateError as error:
            return refused(how[0], error)
        for one, other in zip(got, self.whole[i], strict=True):
            assert all(map(np.array_equal, one, other)), "other rows came back"
        return Outcome(how[0], RIGHT)


def forward(world: World, n: int) -> list[Any]:
    """The outputs of both layers for the next n tokens."""
    outputs = world.forward(world.caches, [world.uids(n)], None)
    return [of_layer[0] for of_layer in outputs]


def change(path: Path, other: Path, dice: random.Random) -> str:
    """Change a file in place: whoever has it open has the change."""
    data = path.read_bytes()
    if path != other and dice.random() < 0.2:
        how, new = "other file", other.read_bytes()
    elif dice.random() < 0.2:
        # A whole block stands where another one was.
        n = (len(data) - len(MAGIC)) // 2
        first, second = data[len(MAGIC) :][:n], data[len(MAGIC) + n :][:n]
        how, new = "blocks swapped", data[: len(MAGIC)] + second + first
    else:
        how, new = mutated_bytes(data, [other.read_bytes()], dice)
    with path.open("r+b") as file:
        file.write(new)
        file.truncate()
    return how


class Rows:
    """A log whose files are changed before they are read."""

    def make(self, place: Path) -> None:
        self.place = place / "a"
        numbers = np.arange(3 * BLOCK + 9)
        keys = (numbers[:, None] * 31 % 2039 + np.arange(5)).astype(np.float16)
        self.rows = {"keys0": keys, "positions": numbers.astype(np.int32)}

    def try_one(self, dice: random.Random) -> Outcome:
        directory = LogDirectory(self.place)
        parts = {n: (a.dtype, a.shape[1:]) for n, a in self.rows.items()}
        limit = dice.choice([None, None, 2 * BLOCK])
        log = directory.log("layer-000", parts, limit)
        log.append(self.rows)
        if dice.random() < 0.3:
            log.truncate(dice.choice([BLOCK + 5, 3 * BLOCK]))
            log.append({n: a[log.count :] for n, a in self.rows.items()})
        files = sorted(self.place.glob("*.rows"))
        how = change(dice.choice(files), dice.choice(files), dice)
        numbers = range(log.first, log.count)
        some = dice.choices(numbers, k=dice.choice([1, 30, 300]))
        try:
            taken = log.take(some)
            if dice.random() < 0.3:
                log.truncate(dice.choice(numbers))
        except CacheStateError as error:
            return refused(how, error)
        finally:
            directory.close()
        for name, rows in taken.items():
            assert np.array_equal(rows, self.rows[name][some]), "other rows came back"
        return Outcome(how, RIGHT)


class LeftBehind:
    """A directory with what a killed run, or somebody else, left in it."""

    def make(self, place: Path) -> None:
        self.place = place

    def try_one(self, dice: random.Random) -> Outcome:
        place = self.place / "a"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        inside = dice.choice([place, place / "caches-000"])
        inside.mkdir(exist_ok=True)
        names = ["lock", "layer-000.keys0.rows", "layer-000.positions.rows", "notes"]
        names += [".DS_Store", "caches-000", "caches-001", "layer 0.rows", "a\n.b.rows"]
        said, foreign = [], []
        for name in dice.sample(names, dice.randint(1, 4)):
            kind = dice.choice([put_rows, put_rows, put_noise, put_none, put_folder])
            kind = dice.choice([kind, kind, put_link, put_fifo])
            path = inside / name
            if path.exists():
                continue
            kind(path, dice)
            said.append(kind.__name__)
            if kind is put_noise or name == "notes":
                foreign.append((path, path.read_bytes() if path.is_file() else None))
        how = " and ".join(sorted(set(said))) or "nothing"
        try:
            log = LogDirectory(inside)
            rows = {"keys0": (np.float16, (4,)), "positions": (np.int32, ())}
            made = log.log("layer-000", rows)
            made.append({n: np.ones((99, *s), t) for n, (t, s) in rows.items()})
            assert (made.take(range(99))["keys0"] == 1).all()
            log.close()
            outcome = Outcome(how, RIGHT)
        except TovaError as error:
            outcome = refused(how, error)
        for path, content in foreign:
            assert os.path.lexists(path), f"{path.name} was deleted"
            assert content is None or path.read_bytes() == content
        return outcome


def put_rows(path: Path, dice: random.Random) -> None:
    path.write_bytes(MAGIC + dice.randbytes(dice.choice([0, 5, 900])))


def put_noise(path: Path, dice: random.Random) -> None:
    path.write_bytes(dice.choice([b"NOTAROWS", b"TOVA ROWS", b"{}\n", b"#!/bin/sh"]))


def put_none(path: Path, dice: random.Random) -> None:
    path.write_bytes(MAGIC[: dice.randrange(len(MAGIC))])


def put_folder(path: Path, dice: random.Random) -> None:
    path.mkdir()


def put_link(path: Path, dice: random.Random) -> None:
    path.symlink_to(dice.choice([Path("/etc/passwd"), path.parent, Path("nowhere")]))


def put_fifo(path: Path, dice: random.Random) -> None:
    os.mkfifo(path)


def kinds() -> list[Kind]:
    used, rows, left = InUse(), Rows(), LeftBehind()
    return [
        Kind("rows of an archive", rows.make, rows.try_one),
        Kind("archive in use", used.make, used.try_one),
        Kind("directory of an archive", left.make, left.try_one),
    ]
