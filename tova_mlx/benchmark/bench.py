"""Rows of every setting at every context length, measured where they are missing.

Each setting first reads in a process of its own, which gives prefill speed, peak memory
and cache bytes, and leaves its caches in files; then all cases decode in turn in this
process. Decode times that are compared are of one run: if one is missing, all are
measured again, and the newest row of a case counts.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import mlx.nn as nn

from ..evaluation.results import Results, Setting
from ..models.saved import load_prompt_cache
from .baselines import FULL, ROTATING
from .bound import bandwidth, milliseconds, weights_read
from .cases import bytes_read, caches_of, can_fill, fill
from .decoding import BLOCK, Case, interleaved, wired
from .reading import DECODED, Job, only

READ = ("prefill_tps", "peak_memory_bytes", "cache_bytes")
Row = dict[str, Any]
# Reads a job elsewhere: numbers of tokens as it goes on, and fields of a `Reading`.
Reader = Callable[[Job], Iterator[int | dict[str, Any]]]


@dataclass(frozen=True)
class How:
    """How a run measures.

    Args:
        contexts: lengths in tokens, ascending.
        step: tokens per prefill step.
        seed: of what is read, and of the order in which cases decode.
        rounds: blocks of decode steps of a case.
        full_up_to: the longest context that `full` really reads.
        bandwidth: bytes per second, None to measure it.
    """

    contexts: tuple[int, ...]
    step: int
    seed: int
    rounds: int
    full_up_to: int
    bandwidth: float | None = None


class Bench:
    """The rows of settings under one way to measure."""

    def __init__(self, results: Results, settings: Sequence[Setting], how: How):
        self.results, self.settings, self.how = results, list(settings), how
        # For decoding; they stay if it is not reached.
        self._folder = results.directory / "caches" / results.name

    def jobs(self) -> list[Job]:
        """What is still to be read, a job for each setting that has something."""
        jobs, decodes = [], self.to_decode() > 0
        for setting in self.settings:
            job = self.job(setting)
            contexts = [c for c in job.contexts if self._to_read(job, c, decodes)]
            if contexts:
                jobs.append(only(job, contexts))
        return jobs

    def job(self, setting: Setting) -> Job:
        """All that a setting reads."""
        how = self.how
        return Job(
            setting, how.contexts, how.step, how.seed, how.full_up_to, str(self._folder)
        )

    def to_decode(self) -> int:
        """How many cases are to be decoded: all, or none."""
        cases = [(s, c) for s in self.settings for c in self.how.contexts]
        done = all(self._row(*case, "decode_ms") for case in cases)
        return 0 if done else len(cases)

    def run(
        self,
        read: Reader,
        load: Callable[[], nn.Module],
        read_on: Callable[[int], Any],
        decoded: Callable[[int], Any],
        say: Callable[..., Any],
    ) -> Iterator[Row]:
        """The rows in order, each when it is known.

        read: reads a job in a process of its own. load: loads the model, for decoding.
        read_on, decoded: called with tokens read and steps decoded since the last call;
        say: with what is being done.
        """
        jobs = {job.setting: job for job in self.jobs()}
        # Before rows are added that it depends on.
        to_decode = self.to_decode()
        for setting in self.settings:
            if setting in jobs:
                say("Reading:", setting)
                for found in read(jobs[setting]):
                    if isinstance(found, int):
                        read_on(found)
                    else:
                        decoded(DECODED + 2)
                        self._add_read(setting, found)
            yield from self._rows(setting, READ)
        if to_decode:
            say("Decoding")
            self._decode(load(), decoded)
        for setting in self.settings:
            yield from self._rows(setting, ("decode_ms",))

    def _to_read(self, job: Job, context: int, decodes: bool) -> bool:
        """Whether a row of a setting is missing, or its caches, if they decode."""
        units = READ if job.reads(context) else READ[1:]
        if not all(self._row(job.setting, context, unit) for unit in units):
            return True
        if not decodes or job.file(context).exists():
            return False
        row = self._row(job.setting, context, "cache_bytes")
        # Those of `full` are filled, if they can be.
        return not (row and job.setting == FULL and row["caches"] == ["KVCache"])

    def _row(self, setting: Setting, context: int, unit: str) -> Row | None:
        key = {**setting._asdict(), "context": context, "unit": unit}
        rows = self.results.rows(task="bench", **key)
        return rows[-1] if rows else None

    def _rows(self, setting: Setting, units: Sequence[str]) -> Iterator[Row]:
        for context in self.how.contexts:
            for unit in units:
                row = self._row(setting, context, unit)
                if row and unit == "decode_ms" and self.how.bandwidth:
                    # Given after it was measured, maybe.
                    row = row | _bound(row, self.how.bandwidth, "given")
                if row:
                    yield row

    def _add(self, setting: Setting, context: int, unit: str, **values: Any) -> Row:
        return self.results.add(
            setting,
            task="bench",
            unit=unit,
            context=context,
            tokens=context,
            stderr=None,
            **values,
        )

    def _add_read(self, setting: Setting, found: dict[str, Any]) -> None:
        context, seconds = found["context"], found["seconds"]
        same = {"filled": found["filled"], "caches": found["kinds"]}
        values: dict[str, Any] = {
            "peak_memory_bytes": {
                "value": found["peak"],
                "n": 1,
                "weights_bytes": found["weights"],
            },
            "cache_bytes": {"value": found["caches"], "n": 1},
        }
        if seconds is not None:
            speed = {"value": context / seconds, "n": 1, "seconds": seconds}
            values["prefill_tps"] = speed
        for unit in READ:
            if unit in values and self._row(setting, context, unit) is None:
                self._add(setting, context, unit, **values[unit], **same)

    def _decode(self, model: nn.Module, progress: Callable[[int], Any]) -> None:
        how = self.how
        with wired(model):
            speed = how.bandwidth or bandwidth()
            cases = self.cases(model)
            weights = weights_read(model)
            # As they are at the context, not what growing on leaves.
            read = []
            for case in cases:
                case.begin()
                read.append(bytes_read(case.caches))
            times = interleaved(model, cases, how.rounds, how.seed, progress)
        medians = {
            (case.setting, case.context): median(t)
            for case, t in zip(cases, times, strict=True)
        }
        for case, nbytes, some in zip(cases, read, times, strict=True):
            low, high = _p20_p80(some)
            values = {
                "value": 1e3 * median(some),
                "n": len(some),
                "p20": 1e3 * low,
                "p80": 1e3 * high,
                "bytes_read": nbytes,
                "weights_read": weights,
            }
            known = "given" if how.bandwidth else "measured"
            ratios = {
                f"ratio_to_{name}": median(some) / medians[other]
                for name, other in self._references(case)
                if other in medians
            }
            self._add(
                case.setting,
                case.context,
                "decode_ms",
                **values,
                **_bound(values, speed, known),
                filled=case.context if case.resets else 0,
                **ratios,
            )
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._folder.parent.is_dir() and not any(self._folder.parent.iterdir()):
            self._folder.parent.rmdir()

    def cases(self, model: nn.Module) -> list[Case]:
        """The cases to decode: caches that have read, of `full` filled if it can be.

        Those of `full` are one, as long as the longest context with a block more.
        """
        cases = []
        whole = caches_of(model, FULL)
        fillable = can_fill(whole)
        if fillable and FULL in self.settings:
            fill(model, whole, max(self.how.contexts))
        for setting in self.settings:
            job = self.job(setting)
            for context in self.how.contexts:
                if setting == FULL and fillable:
                    cases.append(Case(setting, context, whole, resets=True))
                else:
                    caches, _ = load_prompt_cache(job.file(context))
                    cases.append(Case(setting, context, caches))
        return cases

    def _references(self, case: Case) -> Iterator[tuple[str, tuple[Setting, int]]]:
        """What a case is compared with, by the names that its row has for them."""
        setting, context = case.setting, case.context
        first = self.how.contexts[0]
        if context != first:
            yield "first_context", (setting, first)
        if setting != FULL:
            yield "full", (FULL, context)
        rotating = Setting(ROTATING, setting.max_kv_size)
        if setting not in (FULL, rotating):
            yield "rotating", (rotating, context)


def tokens_to_read(job: Job) -> int:
    """Return how many tokens a job reads, those to warm up with included."""
    return job.tokens() + job.warm_up


def steps_to_decode(cases: int, rounds: int) -> int:
    """Return how many steps so many cases take in `interleaved`."""
    return cases * (rounds + 1) * (BLOCK + 2)


def _bound(row: Row, speed: float, known: str) -> Row:
    """What a row of decoding says of its bound; known: "given" or "measured"."""
    bound = milliseconds(row["bytes_read"] + row["weights_read"], speed)
    return {
        "bandwidth": speed,
        "bandwidth_is": known,
        "bound_ms": bound,
        "ratio_to_bound": row["value"] / bound,
    }


def _p20_p80(times: list[float]) -> tuple[float, float]:
    if len(times) == 1:
        return times[0], times[0]
    fifths = quantiles(times, n=5, method="inclusive")
    return fifths[0], fifths[-1]
