"""tova-mlx bench: speed and memory of caches over context lengths."""

import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from ..benchmark.baselines import KEEP, ROTATING
from ..errors import EvaluationError
from ..models.demo import DEMO_MODELS
from .evaluation.options import (
    check_settings,
    evaluation_options,
    quantised_options,
    recall_option,
)
from .evaluation.runner import Evaluation, load_model, wanted_settings
from .parameters import Finite

if TYPE_CHECKING:
    from ..benchmark.reading import Job
    from ..evaluation.results import Setting

_LARGER = "mlx-community/Llama-3.2-3B-Instruct-4bit"
_POLICIES = (ROTATING, "streaming", "h2o", "tova", "fade")
_SAME = ("model", "dtype", "prefill_step_size", "seed", "versions", "device")


@click.command(short_help="Speed and memory over context lengths")
@evaluation_options(
    sizes=(512,),
    policies=_POLICIES,
    others=(ROTATING,),
    step=512,
    of_step="what a step needs on its way is part of the peak memory",
    out="bench",
)
@quantised_options
@recall_option
@click.option(
    "--context",
    "contexts",
    type=click.IntRange(min=2),
    multiple=True,
    default=(1024, 2048, 4096),
    show_default=True,
    help="Tokens that caches have read; may be given several times.",
)
@click.option(
    "--read-full-up-to",
    "full_up_to",
    type=click.IntRange(min=0),
    default=4096,
    show_default=True,
    help="The longest context that full reads from its beginning. Of a longer one it "
    "reads the last step, after random keys and values: peak memory is the same, the "
    "prefill speed is left out.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=30,
    show_default=True,
    help="Decode steps timed per case, rounded up to whole blocks of five.",
)
@click.option(
    "--bandwidth",
    type=Finite(min=0, min_open=True),
    help="Memory bandwidth in GB/s, for the bound.  [default: measured]",
)
def bench(as_json: bool, **options: Any) -> None:
    """Speed and memory over context lengths, beside mlx-lm's own caches

    Does it pay on this machine? `full` is mlx-lm's cache without a limit, `rotating`
    its RotatingKVCache; random tokens are read. Each setting reads in a process of its
    own: prefill tokens/s, peak memory, bytes of all caches. Then all cases decode in
    turn, a few steps each, so that drift of the machine hits all alike: the median of
    a step, 20th and 80th percentile, and the time that the bytes it reads would take
    at the memory's bandwidth. A step costs the same whatever it reads, so for decoding
    full is filled with random keys and values. About four minutes for the demo model
    on two cores. Rows go to results.jsonl in --out, the figure to bench.png; a second
    run there measures what is missing only.

    Example: tova-mlx bench --model mlx-community/Llama-3.2-3B-Instruct-4bit
    --max-kv-size 1024 --context 4096 --context 16384 --out bench-3b
    """
    _check(options)
    contexts = tuple(sorted(set(options["contexts"])))
    begun = time.perf_counter()
    model, _, path, common = load_model(options)
    loading = time.perf_counter() - begun
    from ..benchmark.bench import Bench, How, steps_to_decode, tokens_to_read
    from ..benchmark.cases import tokens_of
    from ..benchmark.decoding import BLOCK
    from ..benchmark.pace import taste
    from ..benchmark.report import plot, table
    from ..evaluation.results import Results
    from .models import load

    tokens = partial(tokens_of, model, context=contexts[-1])
    wanted = [s for s in wanted_settings(options, tokens) if _is_there(s)]
    results = Results(options["out"], common, _SAME)
    rounds = -(-options["steps"] // BLOCK)
    given = options["bandwidth"] and 1e9 * options["bandwidth"]
    step, seed = options["prefill_step_size"], options["seed"]
    how = How(contexts, step, seed, rounds, options["full_up_to"], given)
    measured = Bench(results, wanted, how)
    jobs, cases = measured.jobs(), measured.to_decode()
    steps = steps_to_decode(cases, rounds)
    cost, pace = 0, None
    if jobs or cases:
        pace = taste(model, wanted[-1], step, loading)
        cost = pace.cost(jobs, sum(map(tokens_to_read, jobs)), steps)
        click.echo(_plan(jobs, cases, cost), err=True)
    else:
        click.echo(f"{results.path} has all of it; nothing is measured.", err=True)
    # A process that measures memory has the machine to itself.
    del model, tokens
    _free()

    def measure(advance: Any, say: Any) -> Iterator[dict[str, Any]]:
        token_ms, step_ms, process_ms = pace or (0, 0, 0)

        def read(job: "Job") -> Iterator[int | dict[str, Any]]:
            advance(int(process_ms))
            return _read_in_process(path, job)

        return measured.run(
            read,
            lambda: load(path)[0],
            lambda n: advance(int(n * token_ms)),
            lambda n: advance(int(n * step_ms)),
            say,
        )

    Evaluation(
        "bench",
        results,
        cost=cost,
        measure=measure,
        plot=plot if _can_plot() else lambda rows, path: None,
        table=lambda rows: f"{table(rows)}\n{_next(options['model'])}",
        # What work of several kinds takes, as far as can be told beforehand.
        unit="ms",
    ).run(as_json=as_json)


def _check(options: dict[str, Any]) -> None:
    """Refuse now what no model could do, before one is loaded. Raises UsageError."""
    ours = [policy for policy in options["policies"] if policy != ROTATING]
    check_settings({**options, "policies": ours})
    for size in options["sizes"]:
        if ROTATING in options["policies"] and isinstance(size, int) and size <= KEEP:
            raise click.UsageError(
                f"{ROTATING}: --max-kv-size {size} leaves no room after the first "
                f"{KEEP} tokens, which it keeps. Use at least {KEEP + 1}."
            )


def _is_there(setting: "Setting") -> bool:
    """mlx-lm's own rotating caches are neither quantised nor do they recall."""
    return setting.policy != ROTATING or setting[2:] == (None, None, None)


def _plan(jobs: "list[Job]", cases: int, cost: int) -> str:
    minutes = max(1, round(cost / 60_000))
    parts = []
    if jobs:
        settings = "setting" if len(jobs) == 1 else "settings"
        parts.append(f"{len(jobs)} {settings} read, each in a process of its own")
    if cases:
        parts.append(f"{cases} cases decode in turn")
    return f"About {minutes} min: {', then '.join(parts)}."


def _free() -> None:
    import gc

    import mlx.core as mx

    gc.collect()
    mx.clear_cache()


def _can_plot() -> bool:
    from ..evaluation.plots import pyplot

    try:
        pyplot()
    except EvaluationError as error:
        click.echo(f"No figure: {error}", err=True)
        return False
    return True


def _next(model: str | None) -> str:
    """What to type next."""
    if model is None or model in DEMO_MODELS:
        what = "A larger model"
        options = f"--model {_LARGER} --context 4096 --context 16384 --out bench-3b"
    else:
        what = "Longer contexts"
        named = shlex.quote(model)
        options = f"--model {named} --context 16384 --context 32768 --out bench-long"
    return f"{what}: tova-mlx bench --max-kv-size 1024 {options}"


def _read_in_process(path: str, job: "Job") -> Iterator[int | dict[str, Any]]:
    """What a new process says that reads a job with the model at `path`.

    Raises EvaluationError: it ended with an error.
    """
    command = [sys.executable, "-m", "tova_mlx.cli.bench_process"]
    with (
        tempfile.TemporaryFile() as said,
        # Ctrl-C is for this process, which ends that one.
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"path": path, "job": asdict(job)}))
            process.stdin.close()
            for line in process.stdout:
                yield json.loads(line)
            code = process.wait()
        finally:
            process.kill()
        if code:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines()
            raise EvaluationError(
                f"The process that read with {job.setting} ended with {code} "
                f"({lines[-1] if lines else 'it said nothing'}). If it ran out of "
                "memory: use a shorter --context or a smaller --read-full-up-to."
            )
