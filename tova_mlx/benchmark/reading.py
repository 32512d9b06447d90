"""One setting reads random tokens: prefill speed, peak memory and cache bytes.

Meant for a process of its own, whose peak is that of nothing else. A setting reads on
from one context length to the next: the peak when it has read `context` tokens is that
of a process that stops there.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..evaluation.reading import read
from ..evaluation.results import Setting
from ..hooks.layers import leaves
from ..models.budget import weights_bytes
from ..models.saved import save_prompt_cache
from ..models.vocabulary import vocabulary_size
from .baselines import FULL
from .cases import caches_of, can_fill, fill
from .decoding import decode

# Decoded at each length, so that caches are as they stay.
DECODED = 16


@dataclass(frozen=True)
class Job:
    """What one setting is to read.

    Args:
        setting: its caches.
        contexts: lengths in tokens, ascending.
        step: tokens per prefill step.
        seed: of the tokens.
        full_up_to: the longest context that `full` really reads.
        folder: where caches are saved for decoding.
    """

    setting: Setting
    contexts: tuple[int, ...]
    step: int
    seed: int
    full_up_to: int
    folder: str

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "Job":
        """Read a job that went through JSON as `asdict` gives it."""
        setting = dict(zip(Setting._fields, fields["setting"], strict=True))
        contexts = tuple(fields["contexts"])
        return cls(**{**fields, "setting": Setting.of(setting), "contexts": contexts})

    def file(self, context: int) -> Path:
        """Where the caches are saved that have read so many tokens."""
        name = str(self.setting).replace(" ", "-")
        return Path(self.folder) / f"{name}-{context}.safetensors"

    def reads(self, context: int) -> bool:
        """Whether so many tokens are read, and not filled in, if they can be."""
        return self.setting != FULL or context <= self.full_up_to

    @property
    def warm_up(self) -> int:
        """How many tokens are read before, so that something is evicted."""
        size = self.setting.max_kv_size or self.step
        return min(size + 64, 2 * self.step, max(self.contexts))

    def tokens(self) -> int:
        """Return how many tokens are read, if those of `full` can be filled in."""
        read_up_to = max((c for c in self.contexts if self.reads(c)), default=0)
        filled = [c for c in self.contexts if not self.reads(c)]
        return read_up_to + sum(min(c, self.step) for c in filled)


@dataclass(frozen=True)
class Reading:
    """What was found at a context length.

    seconds: for reading, None where the beginning was `filled` with random keys and
    values (as many tokens); peak, caches: bytes; weights: bytes that the model takes;
    kinds: classes of the caches.
    """

    context: int
    seconds: float | None
    peak: int
    caches: int
    weights: int
    filled: int
    kinds: tuple[str, ...]

    to_dict = asdict


def read_contexts(
    model: nn.Module, job: Job, progress: Callable[[int], Any]
) -> Iterator[Reading]:
    """Read up to each context length in turn; progress: called with tokens read."""
    tokens = random_tokens(model, max(job.contexts), job.seed)
    weights = weights_bytes(model)
    caches = caches_of(model, job.setting)
    fillable = can_fill(caches)
    _warm_up(model, job, tokens)
    done, seconds, peak = 0, 0.0, 0
    mx.reset_peak_memory()
    for context in job.contexts:
        filled = 0
        if fillable and not job.reads(context):
            # Before others take their place.
            del caches
            mx.clear_cache()
            caches = caches_of(model, job.setting)
            filled = done = max(0, context - job.step)
            fill(model, caches, filled)
            mx.reset_peak_memory()
            peak = 0
        begun = time.perf_counter()
        for _ in read(model, tokens[:, done:context], caches, job.step, progress):
            pass
        seconds, done = seconds + time.perf_counter() - begun, context
        decode(model, caches, DECODED)
        peak = max(peak, mx.get_peak_memory())
        yield Reading(
            context=context,
            seconds=None if filled else seconds,
            peak=peak,
            caches=sum(int(c.nbytes) for c in caches),
            weights=weights,
            filled=filled,
            kinds=tuple(dict.fromkeys(type(c).__name__ for c in leaves(caches))),
        )
        if not (fillable and job.setting == FULL):
            _save(caches, job.file(context))
            mx.clear_cache()
        mx.reset_peak_memory()


def random_tokens(model: nn.Module, n: int, seed: int) -> mx.array:
    """Tokens [1, n] from the model's vocabulary; what is read costs the same."""
    mx.random.seed(seed)
    tokens = mx.random.randint(0, vocabulary_size(model) or 2, (1, n))
    mx.eval(tokens)
    return tokens


def _warm_up(model: nn.Module, job: Job, tokens: mx.array) -> None:
    """Read a little with other caches: kernels are compiled, buffers are there."""
    caches = caches_of(model, job.setting)
    for _ in read(model, tokens[:, : job.warm_up], caches, job.step):
        pass
    decode(model, caches, 1)
    del caches
    mx.clear_cache()


def _save(caches: Sequence[Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_prompt_cache(path, list(caches))


def only(job: Job, contexts: Sequence[int]) -> Job:
    """The same job for other context lengths."""
    return replace(job, contexts=tuple(sorted(contexts)))
