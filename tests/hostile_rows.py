"""Rows, answers and losses of evaluations and benchmarks that somebody changed.

The whole ones are this project's own, in results/. What reads them goes on with what it
finds: rows that it needs are measured, which is where these inputs end; what is there
must be a table and, now and then, a figure.
"""

import importlib
import json
import random
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from hostile import RIGHT, Kind, Outcome, mutated_bytes, refused

from tova_mlx.benchmark import report
from tova_mlx.benchmark.bench import Bench, How
from tova_mlx.errors import TovaError
from tova_mlx.evaluation import kept, longrange, needle, perplexity
from tova_mlx.evaluation.answers import Answers
from tova_mlx.evaluation.haystack import Cell
from tova_mlx.evaluation.results import Results, Setting

RESULTS = Path(__file__).parents[1] / "results"


def table_of(command: str) -> Any:
    return importlib.import_module(f"tova_mlx.cli.evaluation.{command}")._table


class Missing(Exception):
    """A row that has to be measured."""


def stop(*_: Any, **__: Any) -> Any:
    raise Missing


class Stops:
    """Cases that nobody asks."""

    def __iter__(self) -> Any:
        raise Missing

    def __len__(self) -> int:
        return 1


class Reading:
    """What one evaluation does with its rows; `same`: the names that tell a run."""

    def __init__(self, folder: str, same: tuple[str, ...]):
        lines = (RESULTS / folder / "results.jsonl").read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        self.same, self.common = same, rows[0]
        mine = [r for r in rows if all(r[n] == rows[0][n] for n in same)]
        self.settings = list(dict.fromkeys(map(Setting.of, mine)))[:3]
        self.rows = [r for r in mine if Setting.of(r) in self.settings]

    def results(self, place: Path) -> Results:
        return Results(place, self.common, self.same)

    def read(self, place: Path, draws: bool) -> None:
        raise NotImplementedError


class Perplexity(Reading):
    def read(self, place: Path, draws: bool) -> None:
        windows = np.zeros((2, 8), np.int32)
        measured = perplexity.Perplexity(self.results(place), windows, 4)
        with mock.patch.object(measured, "_measure", stop):
            rows = list(measured.run(None, self.settings))  # type: ignore[arg-type]
        assert table_of("perplexity")(rows)
        if draws:
            perplexity.plot(rows, place / "a.png")


class Needle(Reading):
    def read(self, place: Path, draws: bool) -> None:
        names = ("kind", "length", "depth")
        cells = {Cell(*(r[n] for n in names)): Stops() for r in self.rows}
        measured = needle.Needle(self.results(place), cells, 4)  # type: ignore
        rows = list(measured.run(None, None, self.settings))  # type: ignore
        assert table_of("needle")(needle.summary(rows))
        if draws:
            needle.plot(rows, place / "a.png")


class Kept(Reading):
    def read(self, place: Path, draws: bool) -> None:
        kinds = [k for k, n in self.rows[-1]["counts"].items() for _ in range(n)]
        measured = kept.Kept(self.results(place), [0] * len(kinds), kinds, 4)
        with mock.patch.object(measured, "_measure", stop):
            rows = list(measured.run(None, self.settings))  # type: ignore
        assert table_of("kept")(rows)
        if draws:
            kept.plot(rows, place / "a.png")


class LongRange(Reading):
    def read(self, place: Path, draws: bool) -> None:
        results = self.results(place)
        prompts = self.rows[0]["prompts"]
        tasks = {r["task"] for r in self.rows if r["prompts"] == prompts}
        rows = []
        for setting in self.settings:
            wanted = {"prompts": prompts, **setting._asdict()}
            rows += [r for t in tasks for r in results.rows(task=t, **wanted)[:1]]
        if not rows:
            raise Missing
        assert table_of("longrange")(rows)
        if draws:
            longrange.plot(rows, place / "a.png")


class Benchmark(Reading):
    def read(self, place: Path, draws: bool) -> None:
        contexts = tuple(sorted({r["context"] for r in self.rows}))
        how = How(contexts, 512, 0, 12, 4096, None)
        measured = Bench(self.results(place), self.settings, how)
        rows = list(measured.run(stop, stop, stop, stop, lambda *_: None))
        assert report.table(rows)
        if draws:
            report.plot(rows, place / "a.png")


BENCH = ("model", "dtype", "prefill_step_size", "seed", "versions", "device")
TEXT = ("model", "dtype", "text", "text_sha256", "tokens", "context")
READINGS = {
    "perplexity": lambda: Perplexity("perplexity", TEXT),
    "bits": lambda: Perplexity("bits/SmolLM2-135M-Instruct", TEXT),
    "needle": lambda: Needle(
        "needle", ("model", "dtype", "seed", "text", "text_sha256", "cases")
    ),
    "kept": lambda: Kept("kept", TEXT[:-1]),
    "longrange": lambda: LongRange("longrange", ("model", "dtype")),
    "bench": lambda: Benchmark("bench", BENCH),
}


class Rows:
    def make(self, place: Path) -> None:
        self.place = place / "out"
        self.readings = {name: make() for name, make in READINGS.items()}
        for reading in self.readings.values():
            self._write(lines_of(reading.rows))
            reading.read(self.place, draws=False)

    def _write(self, data: bytes) -> Path:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        path = self.place / "results.jsonl"
        path.write_bytes(data)
        return path

    def try_one(self, dice: random.Random) -> Outcome:
        name, reading = dice.choice(list(self.readings.items()))
        other = lines_of(dice.choice(list(self.readings.values())).rows)
        how, data = mutated_rows(reading.rows, other, dice)
        how = f"{name}, {how}"
        path = self._write(data)
        try:
            reading.read(self.place, draws=dice.random() < 0.02)
        except TovaError as error:
            assert path.read_bytes() == data, "refused, and changed"
            return refused(how, error)
        except Missing:
            return Outcome(how, RIGHT, "measured")
        finally:
            left = path.read_bytes()
        # A last line that was cut off is all that may go.
        assert data.startswith(left[: data.rfind(b"\n") + 1]), "lines were lost"
        assert len(left) >= data.rfind(b"\n") + 1, "lines were lost"
        return Outcome(how, RIGHT)


def lines_of(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


VALUES: list[Any] = [
    *[None, True, False, -1, 0, 1, 2**31, 2**63, 10**30, 10**400, 0.5, 1e300],
    *[float("nan"), float("inf"), "", "1", "\x1b[31m", "x" * 10**5, [], [1], {}, [[]]],
    {"a": 1},
]


def mutated_rows(
    rows: list[dict[str, Any]], other: bytes, dice: random.Random
) -> tuple[str, bytes]:
    if dice.random() < 0.3:
        how, data = mutated_bytes(lines_of(rows), [other], dice)
        return f"bytes {how}", data
    rows = [dict(row) for row in rows]
    said = []
    for _ in range(dice.choice([1, 1, 3])):
        row = dice.choice(rows)
        kind = dice.randrange(4)
        if kind < 2 or not row:
            name = dice.choice([*row, "kv_bits", "recall", "unit"])
            row[name] = dice.choice(VALUES)
            said.append("value")
            if isinstance(row.get(name), dict) and dice.random() < 0.5:
                row[name] = {k: dice.choice(VALUES) for k in row[name]}
        elif kind == 2:
            del row[dice.choice(list(row))]
            said.append("field missing")
        else:
            rows.remove(row)
            rows = rows or [{}]
            said.append("row missing")
    data = lines_of(rows)
    if dice.random() < 0.2:
        deep = b"[" * 10**5 + b"\n"
        lines = [b"3\n", b"null\n", b"[]\n", b"{}\n", b'""\n', b"\n", deep, b"\xff\n"]
        more = dice.choice([*lines, b'[["a", 1]]\n', b"\xef\xbb\xbf{}\n", b"9" * 5000])
        at = dice.choice([0, len(data)])
        data, said = data[:at] + more + data[at:], [*said, "another line"]
    return " and ".join(sorted(set(said))), data


class Losses:
    """The .npy files beside the rows of `eval perplexity`."""

    def make(self, place: Path) -> None:
        self.place = place / "out"
        self.reading = Perplexity("perplexity", TEXT)
        self.windows = np.zeros((2, 8), np.int32)
        self.losses = np.linspace(1, 3, 14, dtype=np.float32).reshape(2, 7)

    def try_one(self, dice: random.Random) -> Outcome:
        shutil.rmtree(self.place, ignore_errors=True)
        results = self.reading.results(self.place)
        measured = perplexity.Perplexity(results, self.windows, 4)
        setting = self.reading.settings[0]
        measured._save(setting, self.losses)
        path = measured._path(setting)
        how, data = mutated_bytes(path.read_bytes(), [path.read_bytes()], dice)
        path.write_bytes(data)
        got = measured._saved(setting)
        if got is None:
            return Outcome(how, "refused", "measured again")
        assert got.shape == self.losses.shape
        assert np.isfinite(got).all()
        return Outcome(how, RIGHT)


class AnswersFile:
    @staticmethod
    def task(i: int) -> str:
        return "story" if i > 3 else "qasper"

    def make(self, place: Path) -> None:
        self.place = place / "out"
        self.place.mkdir()
        self.same = {"model": "tiny", "dtype": "float32"}
        answers = Answers(self.place, self.same)
        common = {"tokens": 5, "cut_tokens": 0, "question": "?", "references": ["a"]}
        for i in range(6):
            scored = {"score": 0.5}
            if self.task(i) == "story":
                scored = {"loss": 1.5, "repetition": 0.1}
            values = {**common, **scored, "source": i, "answer": "a\n"}
            answers.add(self.task(i), f"{i}", Setting("tova", 8), **values)
        text = answers.path.read_text("utf-8")
        self.rows = [json.loads(line) for line in text.splitlines()]

    def try_one(self, dice: random.Random) -> Outcome:
        how, data = mutated_rows(self.rows, lines_of(self.rows), dice)
        path = self.place / "answers.jsonl"
        path.write_bytes(data)
        try:
            answers = Answers(self.place, self.same)
        except TovaError as error:
            assert path.read_bytes() == data, "refused, and changed"
            return refused(how, error)
        for i in range(6):
            task = longrange.Task(self.task(i), "", [], [], 1)
            found = answers.get(task.name, f"{i}", Setting("tova", 8))
            if found is not None:
                assert longrange._mean(task, [found])["value"] is not None
        return Outcome(how, RIGHT)


def kinds() -> list[Kind]:
    rows, losses, answers = Rows(), Losses(), AnswersFile()
    return [
        Kind("rows of an evaluation", rows.make, rows.try_one),
        Kind("losses of an evaluation", losses.make, losses.try_one),
        Kind("answers of an evaluation", answers.make, answers.try_one),
    ]
