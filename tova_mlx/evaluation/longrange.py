"""Long-range tasks under bounded caches: summaries, answers and stories.

A model reads a long document and writes: to a question about it (SQuALITY, QASPER), or
how it goes on. Decoding is greedy for questions and drawn for stories. A row is the
mean over the examples of a task under one setting; what was written is kept beside it.

Source: the three kinds of Oren et al. 2024, arXiv 2401.06104. Differs from the source:
stories go on from a text and are scored by the full model's perplexity and by
repetition, not by another model's preference.
"""

import copy
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from .answers import Answers
from .plots import (
    Style,
    draw_by_size,
    full_style,
    legend_below,
    new_figure,
    save,
    styles,
)
from .prompts import Prompt
from .reading import Progress, answer, filled
from .results import Results, Setting, missing
from .scores import f1, mean_over, repetition, rouge_l
from .stories import loss_under_full, tell
from .tasks import Example

UNITS = {"squality": "rouge_l", "qasper": "f1", "story": "perplexity"}
_SCORES = {"squality": rouge_l, "qasper": f1}
_TITLES = {
    "squality": ("SQuALITY", "summaries", "ROUGE-L F (higher is better)"),
    "qasper": ("QASPER", "answers", "token F1 (higher is better)"),
    "story": ("Stories", "continuations", "perplexity under full (lower is better)"),
}
_FULL = Setting("full", None)

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """What is asked. `data`: where it came from; `temp` and `seed`: of stories."""

    name: str
    data: str
    examples: list[Example]
    prompts: list[Prompt]
    max_tokens: int
    temp: float = 0.0
    seed: int = 0

    @cached_property
    def digests(self) -> list[str]:
        """What tells each prompt, and how it is gone on with, from any other."""
        how = (self.name, self.max_tokens, self.temp, self.seed)
        return [_digest(*how, i, p.tokens) for i, p in enumerate(self.prompts)]

    @cached_property
    def digest(self) -> str:
        """The same for all of them."""
        return _digest(*self.digests)

    def __str__(self) -> str:
        return self.name

    @cached_property
    def shared(self) -> list[int]:
        """Of each prompt how many tokens all prompts on its document begin with.

        At least one token of a prompt is left; 0 where a document has one prompt.
        """
        prompts = defaultdict(list)
        for example, prompt in zip(self.examples, self.prompts, strict=True):
            prompts[example.source].append(prompt.tokens)
        lengths = {
            source: _alike([tokens[:-1] for tokens in some])
            for source, some in prompts.items()
            if len(some) > 1
        }
        return [lengths.get(example.source, 0) for example in self.examples]

    @property
    def cost(self) -> int:
        """Tokens read and written at most: the unit of progress."""
        return sum(len(p.tokens) + self.max_tokens for p in self.prompts)


class LongRange:
    """Rows and answers of a model on long-range tasks, under any settings."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        results: Results,
        answers: Answers,
        step: int,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.results, self.answers, self.step = results, answers, step
        # What the last prompts shared, and the caches that have read it.
        self._begun: tuple[Any, list[Any]] = (None, [])

    def cost(self, tasks: list[Task], settings: list[Setting]) -> int:
        """What is to be done, in the unit of progress."""
        return sum(task.cost * len(self._missing(task, settings)) for task in tasks)

    def run(
        self,
        tasks: list[Task],
        settings: list[Setting],
        progress: Progress = lambda n: None,
        began: Callable[[Task, Setting], Any] = lambda task, setting: None,
    ) -> Iterator[dict[str, Any]]:
        """The rows of every task and setting in order, measured where missing."""
        for task in tasks:
            to_measure = self._missing(task, settings)
            for setting in settings:
                row = self._row(task, setting)
                if setting in to_measure:
                    began(task, setting)
                    # Those on one document after each other, see `_caches`.
                    order = sorted(
                        range(len(task.examples)), key=lambda i: task.examples[i].source
                    )
                    for i in order:
                        self._answer(task, i, setting, progress)
                    values = self._values(task, setting, self._known(task, setting))
                    row = row or self.results.add(setting, **values)
                assert row is not None
                yield row

    def _missing(self, task: Task, settings: list[Setting]) -> list[Setting]:
        """The settings to measure: see `results.missing`."""
        return missing(
            settings,
            measured=lambda s: self._row(task, s) is not None,
            references=lambda s: list(_references(s).values()),
            saved=lambda s: len(self._known(task, s)) == len(task.examples),
        )

    def _known(self, task: Task, setting: Setting) -> Rows:
        known = [self.answers.get(task.name, d, setting) for d in task.digests]
        return [answer for answer in known if answer is not None]

    def _row(self, task: Task, setting: Setting) -> dict[str, Any] | None:
        wanted = {"task": task.name, "prompts": task.digest, **setting._asdict()}
        rows = self.results.rows(**wanted)
        return rows[0] if rows else None

    def _answer(self, task: Task, i: int, setting: Setting, progress: Progress) -> None:
        """Have the answer to an example, made if it is not there."""
        digest = task.digests[i]
        if self.answers.get(task.name, digest, setting) is None:
            example, prompt = task.examples[i], task.prompts[i]
            self.answers.add(
                task.name,
                digest,
                setting,
                source=example.source,
                tokens=len(prompt.tokens),
                cut_tokens=prompt.cut_tokens,
                question=example.question,
                references=example.references,
                **self._write(task, i, setting),
            )
        progress(len(task.prompts[i].tokens) + task.max_tokens)

    def _write(self, task: Task, i: int, setting: Setting) -> dict[str, Any]:
        """What the model says to an example, and its score."""
        prompt = task.prompts[i].tokens
        n, cache = self._caches(task, i, setting)
        ask = (self.model, self.tokenizer, prompt[n:], cache)
        ask = (*ask, self.step, task.max_tokens)
        if task.name != "story":
            said = answer(*ask)
            score = _SCORES[task.name](said, task.examples[i].references)
            return {"answer": said, "score": score}
        # The same draws for every setting.
        said, tokens = tell(*ask, temp=task.temp, seed=task.seed + i)
        return {
            "answer": said,
            "loss": loss_under_full(self.model, prompt, tokens, self.step),
            "repetition": repetition(said),
        }

    def _caches(self, task: Task, i: int, setting: Setting) -> tuple[int, list[Any]]:
        """How many tokens of a prompt its caches have read, and those caches."""
        n = task.shared[i]
        begin = task.prompts[i].tokens[:n]
        if self._begun[0] != (setting, begin):
            cache = filled(self.model, begin, setting, self.step)
            self._begun = (setting, begin), cache
        return n, copy.deepcopy(self._begun[1])

    def _values(self, task: Task, setting: Setting, answers: Rows) -> dict[str, Any]:
        row: dict[str, Any] = {
            "task": task.name,
            "unit": UNITS[task.name],
            **_mean(task, answers),
            "n": len(answers),
            "data": task.data,
            "prompts": task.digest,
            "max_tokens": task.max_tokens,
            "tokens": round(float(np.mean([a["tokens"] for a in answers])), 1),
            "cut_tokens": round(float(np.mean([a["cut_tokens"] for a in answers])), 1),
        }
        if task.name == "story":
            row["temp"] = task.temp
            row["repetition"] = float(np.mean([a["repetition"] for a in answers]))
        for name, other in _references(setting).items():
            row |= self._against(task, answers, name, other)
        return row

    def _against(
        self, task: Task, answers: Rows, name: str, other: Setting
    ) -> dict[str, Any]:
        """Difference to another on the same examples; for stories the ratio."""
        others = self._known(task, other)
        if len(others) < len(answers):
            return {}
        what = "loss" if task.name == "story" else "score"
        change = [
            {**a, what: a[what] - b[what]} for a, b in zip(answers, others, strict=True)
        ]
        mean = _mean(task, change)
        how = f"ratio_to_{name}" if task.name == "story" else f"minus_{name}"
        return {how: mean["value"], f"{how}_stderr": mean["stderr"]}


def _references(setting: Setting) -> dict[str, Setting]:
    """What a setting is compared with, by the names that its row has for them.

    `full`, and of what recalls, `no_recall`: the same without.
    """
    others = {"full": _FULL}
    if setting.recall is not None:
        others["no_recall"] = setting._replace(recall=None)
    return {name: other for name, other in others.items() if other != setting}


def _mean(task: Task, answers: Rows) -> dict[str, Any]:
    """Value and standard error; the mean of losses as a perplexity."""
    sources = [a["source"] for a in answers]
    if task.name != "story":
        value, error = mean_over([a["score"] for a in answers], sources)
        return {"value": value, "stderr": error}
    loss, error = mean_over([a["loss"] for a in answers], sources)
    value = math.exp(loss)
    return {"value": value, "stderr": None if error is None else value * error}


def _alike(rows: list[list[int]]) -> int:
    """How many tokens all rows begin with."""
    columns = zip(*rows, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def plot(rows: Rows, path: Path) -> Path:
    """A panel per task: its value against tokens kept, `full` dashed."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    looks = styles(rows)
    figure, panels = new_figure(
        width=5 * len(tasks) + 1, ncols=len(tasks), squeeze=False
    )
    for axes, task in zip(panels[0], tasks, strict=True):
        _panel(axes, [row for row in rows if row["task"] == task], looks)
    legend_below(figure, panels[0], 4 * len(tasks))
    figure.suptitle(f"{rows[0]['model']}: long-range tasks, ± standard error")
    return save(figure, path)


def _panel(axes: Any, rows: Rows, looks: Mapping[str, Style]) -> None:
    for row in rows:
        if row["policy"] == "full":
            error = row["stderr"] or 0
            band = (row["value"] - error, row["value"] + error)
            axes.axhspan(*band, color=full_style()["color"], alpha=0.12, linewidth=0)
    # Side by side, or the bars of one size would cover each other.
    sizes = draw_by_size(axes, rows, looks, apart=0.08)
    if sizes:
        axes.set_xlim(sizes[0] / 1.6, sizes[-1] * 1.6)
        axes.minorticks_off()
    name, things, unit = _TITLES[rows[0]["task"]]
    first = rows[0]
    axes.set_title(
        f"{name}: {first['n']} {things}, prompts of {first['tokens']:,.0f} tokens",
        fontsize="medium",
    )
    axes.set_ylabel(unit)
