"""Decode steps of several cases, timed in turn so that drift hits all alike.

A step is one of mlx-lm's `generate_step`, greedy: what a user waits for between two
tokens, the next step's graph being built meanwhile.
"""

import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step, generation_stream, wired_limit

from ..evaluation.results import Setting
from ..hooks.layers import leaves

# Steps timed in a row before the next case has its turn; one before them is not timed,
# for it waits for what is under way, and one more is under way when they end.
BLOCK = 5
# Steps that a block of BLOCK takes.
TAKEN = BLOCK + 2


@dataclass
class Case:
    """Caches that have read a context.

    resets: they are plain ones that have room for more, and begin every block at their
    context; caches of several cases may be the same.
    """

    setting: Setting
    context: int
    caches: list[Any]
    resets: bool = False

    def begin(self) -> None:
        """Be at the context, if that can be."""
        if self.resets:
            for cache in leaves(self.caches):
                cache.offset = self.context


def decode(model: nn.Module, caches: list[Any], n: int) -> list[float]:
    """Decode n steps and two more; the seconds of each of the n."""
    steps = generate_step(mx.array([1]), model, max_tokens=-1, prompt_cache=caches)
    next(steps)
    times, before = [], time.perf_counter()
    for _ in range(n):
        next(steps)
        now = time.perf_counter()
        times.append(now - before)
        before = now
    steps.close()
    mx.synchronize(generation_stream)
    return times


def interleaved(
    model: nn.Module,
    cases: Sequence[Case],
    rounds: int,
    seed: int,
    progress: Callable[[int], Any],
) -> list[list[float]]:
    """The seconds of `rounds` times BLOCK steps of each case.

    In every round each case has one block, in another order each time; one round before
    is not timed. progress: called with how many steps were taken.
    """
    times: list[list[float]] = [[] for _ in cases]
    order, draw = list(range(len(cases))), random.Random(seed)
    for i in range(rounds + 1):
        draw.shuffle(order)
        for place in order:
            cases[place].begin()
            found = decode(model, cases[place].caches, BLOCK)
            progress(TAKEN)
            if i:
                times[place] += found
    return times


@contextmanager
def wired(model: nn.Module) -> Iterator[None]:
    """Have the model wired on a Mac, as mlx-lm has it while it generates."""
    streams: Any = [generation_stream]
    # What it says of large models is no result.
    with redirect_stdout(sys.stderr), wired_limit(model, streams):
        yield
