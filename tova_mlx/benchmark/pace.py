"""How long a benchmark will take here, from a first taste of the model."""

import time
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..evaluation.reading import read
from ..evaluation.results import Setting
from .cases import caches_of
from .decoding import decode
from .reading import DECODED, Job, random_tokens

# Steps that are timed for it.
_STEPS = 3
# Tokens of a step that are read for it at most.
_TOKENS = 256


class Pace(NamedTuple):
    """Milliseconds: of a token that is read, a step that is decoded, a process."""

    token: float
    step: float
    process: float

    def cost(self, jobs: list[Job], tokens: int, steps: int) -> int:
        """Return the milliseconds of so much.

        tokens: read by all jobs; steps: decoded after them.
        """
        steps += sum(len(job.contexts) * (DECODED + 2) for job in jobs)
        own = tokens * self.token + steps * self.step
        return int(own + len(jobs) * self.process)


def taste(model: nn.Module, setting: Setting, step: int, loading: float) -> Pace:
    """Read and decode a little. loading: seconds that the model took to load."""
    n = min(step, _TOKENS)
    tokens = random_tokens(model, 2 * n, 0)
    caches, times = caches_of(model, setting), []
    for part in (tokens[:, :n], tokens[:, n:]):
        begun = time.perf_counter()
        for _ in read(model, part, caches, n):
            pass
        times.append(time.perf_counter() - begun)
    step_ms = 1e3 * min(decode(model, caches, _STEPS))
    del caches
    mx.clear_cache()
    # A process imports and loads again.
    return Pace(1e3 * times[-1] / n, step_ms, 1e3 * (2 + loading))
