"""Kernels like those of `mx.fast.metal_kernel` that run on the CPU and are checked."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from . import arrays
from .build import CompileError, build
from .findings import Finding, Kind, MSLError
from .lint import lint
from .record import Record, record
from .run import Counts, Setting, run, threadgroup_bytes

_MAX_THREADS = 1024
_MAX_THREADGROUP_BYTES = 32 << 10

_metal_kernel = mx.fast.metal_kernel


def _asked(name: str) -> bool:
    """Whether the environment asks for it, as in `MSLCHECK_FLUSH=1`."""
    return os.environ.get(f"MSLCHECK_{name}", "0") != "0"


@dataclass(frozen=True)
class Options:
    """How kernels run.

    Attributes:
        checked: look for races, bounds and all else; otherwise run fast.
        orders: runs per call, each with the threads in another order. What they write
            must agree to the bit.
        seed: of the first order: 0 forwards, 1 backwards, others shuffled.
        fused: round a product and a sum in one expression once, as Metal may.
        flush: take denormal float32 numbers for 0, as arguments and as results, as
            Metal may. A number that is only moved stays as it is, and so do float16.
        width: threads of a simdgroup, at most 64.
        seconds: of CPU time that one run may take.
        counts: takes each run's kernel and `Counts`.
    """

    checked: bool = True
    orders: int = 2
    seed: int = 0
    fused: bool = field(default_factory=lambda: _asked("FUSED"))
    flush: bool = field(default_factory=lambda: _asked("FLUSH"))
    width: int = 32
    seconds: int = 120
    counts: list[tuple[str, Counts]] | None = None


class Kernel:
    """In place of the object that `mx.fast.metal_kernel` returns.

    Runs when it is called, not when its outputs are evaluated, so its inputs cannot be
    tracers of `mx.compile` or `mx.grad`. Raises MSLError with what was found.
    """

    def __init__(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        **keywords: Any,
    ):
        self.name = name
        self.input_names = list(input_names)
        self.output_names = list(output_names)
        self._metal: Any = _metal_kernel(
            name=name,
            input_names=input_names,
            output_names=output_names,
            source=source,
            header=header,
            **keywords,
        )

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
        **keywords: Any,
    ) -> list[mx.array]:
        given = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        keywords |= {"output_shapes": output_shapes, "output_dtypes": output_dtypes}
        call = record(lambda *x: self._metal(inputs=list(x), **keywords), given)
        if verbose:
            print(call.source)
        _launched.append(self.name)
        self._raise_if(_refusals(call))
        library = self._build(call)
        arguments = list(arrays.inputs(self.input_names, given, call))
        results: list[list[arrays.Array]] = []
        for setting in _settings(call):
            outputs = [
                arrays.output(name, shape, dtype, init_value)
                for name, shape, dtype in zip(
                    self.output_names, output_shapes, output_dtypes, strict=True
                )
            ]
            found, counts = run(library, [*arguments, *outputs], setting)
            self._raise_if(found)
            if _options.counts is not None:
                _options.counts.append((self.name, counts))
            results.append([output.array for output in outputs])
        self._raise_if(_differences(self.output_names, results))
        pairs = zip(results[0], output_dtypes, strict=True)
        return [arrays.to_mlx(array, dtype) for array, dtype in pairs]

    def _build(self, call: Record) -> Path:
        try:
            library = build(call.source, _options.checked, _options.fused)
        except CompileError as error:
            raise MSLError(self.name, error.findings) from None
        used = threadgroup_bytes(library)
        if used > _MAX_THREADGROUP_BYTES:
            message = f"{used} bytes of {_MAX_THREADGROUP_BYTES}"
            self._raise_if([Finding(Kind.THREADGROUP_MEMORY, message)])
        return library

    def _raise_if(self, findings: Sequence[Finding]) -> None:
        if findings:
            raise MSLError(self.name, findings)


_options = Options()
_launched: list[str] = []


def install(**options: Any) -> list[str]:
    """Have `mx.fast.metal_kernel` make checked kernels; `options` as in `Options`.

    Returns a list that the names of kernels are added to when they run. Kernels that
    were made before stay what they are. Where there is Metal this does nothing.
    """
    global _options, _launched
    _options, _launched = Options(**options), []
    if not mx.metal.is_available():
        mx.fast.metal_kernel = Kernel
    return _launched


def uninstall() -> None:
    """Undo `install`. Kernels that were made meanwhile stay checked ones."""
    global _options
    _options = Options()
    mx.fast.metal_kernel = _metal_kernel


@contextlib.contextmanager
def checked_kernels(**options: Any) -> Iterator[list[str]]:
    """`install` and, at the end, what was before."""
    global _options, _launched
    before = _options, _launched, mx.fast.metal_kernel
    try:
        yield install(**options)
    finally:
        _options, _launched, mx.fast.metal_kernel = before


def _settings(call: Record) -> Iterator[Setting]:
    options = _options
    for i in range(options.orders if options.checked else 1):
        yield Setting(
            grid=call.grid,
            threadgroup=call.threadgroup,
            width=options.width,
            seed=options.seed + i,
            seconds=options.seconds,
            checked=options.checked,
            flush=options.flush,
        )


def _refusals(call: Record) -> list[Finding]:
    """What Metal would not even start."""
    findings = lint(call.source)
    if min(*call.grid, *call.threadgroup) < 1:
        message = f"grid {call.grid} in threadgroups of {call.threadgroup}"
        findings.append(Finding(Kind.LAUNCH, message))
    x, y, z = call.threadgroup
    if x * y * z > _MAX_THREADS:
        message = f"{x * y * z} threads in a threadgroup of at most {_MAX_THREADS}"
        findings.append(Finding(Kind.LAUNCH, message))
    return findings


def _differences(
    names: Sequence[str], results: Sequence[Sequence[arrays.Array]]
) -> list[Finding]:
    first, *others = results
    return [
        Finding(Kind.ORDER, f"{name} differs when the threads run in another order")
        for i, name in enumerate(names)
        if any(first[i].tobytes() != other[i].tobytes() for other in others)
    ]
