"""Operations that a decode step and a prefill block launch on a GPU, counted here.

    python scripts/count_dispatches.py [--limit 64] [--real] [--out FILE]

A step is traced on the path that Metal takes, with our kernels and the fused attention
as one operation each, and what the same model launches with mlx-lm's own cache is taken
off: `KVCache`, `QuantizedKVCache` or `BatchKVCache`, at as many tokens. What is left is
per layer and token, once the cache is full. An operation counts what MLX's Metal
backend launches for it: none for a view, two for a write whose place is only known on
the device (its offset, then the copy), one for every input of a concatenation. An
input that a kernel needs contiguous and that is a view of something else counts as a
copy. `--real` times steps too, with what it runs on. The last line is JSON.
"""

import argparse
import collections
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
from common import finish, provenance
from mlx_lm.models import llama
from mlx_lm.models.cache import (
    BatchKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from tova_mlx import make_prompt_cache
from tova_mlx.caches.batch import BatchPolicyKVCache
from tova_mlx.eviction import choice_kernel, scan_kernels, step_kernel
from tova_mlx.policies import keydiff_kernel
from tova_mlx.storage import metal
from tova_mlx.storage.entries import arrays_of

KERNELS = (
    *(step_kernel._kernel, choice_kernel._kernel, metal.take_kernel),
    *(scan_kernels._rows_kernel, scan_kernels._scores_kernel),
    scan_kernels._scan_kernel,
    *(keydiff_kernel._kernel, keydiff_kernel._scan_kernel),
)
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 64
BLOCK = 64
POLICIES = ("window", "streaming", "tova", "h2o", "vatp", "fade", "keydiff")

# A view, or nothing at all. A reshape of what a model and our code make is a view too.
VIEWS = frozenset(
    (
        *("AsStrided", "Broadcast", "BroadcastAxes", "Copy", "Depends"),
        *("ExpandDims", "Flatten", "NumberOfElements", "Reshape", "Slice", "Split"),
        *("Squeeze", "StopGradient", "Transpose", "Unflatten", "View"),
    )
)
# Launches of those that are not one: see `eval_gpu` of each in MLX's Metal backend.
LAUNCHES = {"DynamicSlice": 2, "DynamicSliceUpdate": 2, "Pad": 2}


class Trace:
    """What a function launches, by name of the operation."""

    def __init__(self) -> None:
        self.launches: collections.Counter[str] = collections.Counter()
        self._needed: list[mx.array] = []
        self._contiguous: list[int] = []
        self._makers: dict[str, dict[str, Any]] = {}
        self._outputs: list[str] = []

    def stand_in(
        self, name: str, inputs: list[mx.array], outputs: Any, *, contiguous: bool
    ) -> list[mx.array]:
        """Count one launch; what comes of it is known already.

        outputs: shapes and types; contiguous: whether all inputs must be.
        """
        self.launches[name] += 1
        if contiguous:
            there = len(self._needed)
            self._contiguous += range(there, there + len(inputs))
        self._needed += inputs
        return [known(shape, kind) for shape, kind in outputs]

    def run(self, function: Callable[[mx.array], list[mx.array]], given: mx.array):
        """Trace a function; it returns all that is to be computed."""
        n = 0

        def traced(x: mx.array) -> list[mx.array]:
            nonlocal n
            outputs = function(x)
            n = len(outputs)
            return [*outputs, *self._needed]

        mx.export_function(self._note, traced, given)
        for i in self._contiguous:
            if self._is_cut(self._outputs[n + i]):
                self.launches["copy for a kernel"] += 1

    def _note(self, what: dict[str, Any]) -> None:
        if what["type"] == "outputs":
            self._outputs = [o[0] for o in what["outputs"]]
        if what["type"] != "primitive":
            return
        name = what["name"]
        for output in what["outputs"]:
            self._makers[output[0]] = what
        if name == "Concatenate":
            self.launches[name] += len(what["inputs"])
        elif name not in VIEWS:
            self.launches[name] += LAUNCHES.get(name, 1)

    def _is_cut(self, array: str) -> bool:
        """Whether an array is a view with gaps, or in another order, of what it is of.

        One axis longer than 1 before what is sliced is enough.
        """
        maker = self._makers.get(array)
        if maker is None or maker["name"] not in VIEWS or not maker["inputs"]:
            return False
        source, _, _ = maker["inputs"][0]
        shape, before = maker["outputs"][0][1], maker["inputs"][0][1]
        if maker["name"] in ("Broadcast", "BroadcastAxes") and shape != before:
            return True
        if maker["name"] == "Transpose" and _longer(shape) != _longer(before):
            return True
        if maker["name"] == "Slice" and shape != before:
            first = next(i for i, n in enumerate(shape) if n != before[i])
            if any(n > 1 for n in shape[:first]):
                return True
        return self._is_cut(source)


def _longer(shape: tuple[int, ...]) -> list[int]:
    return [n for n in shape if n > 1]


def known(shape: tuple[int, ...], kind: mx.Dtype) -> mx.array:
    """Zeros that are there already, so that nothing is launched for them."""
    zeros = mx.zeros(shape, kind)
    mx.eval(zeros)
    return zeros


@contextlib.contextmanager
def on_metal(trace: Trace) -> Iterator[None]:
    """Take Metal's path, with something that is traced in the place of kernels."""

    def metal_kernel(name: str, **_: Any) -> Callable[..., Any]:
        def launch(inputs: Any, output_shapes: Any, output_dtypes: Any, **_: Any):
            outputs = zip(output_shapes, output_dtypes, strict=True)
            return trace.stand_in(f"kernel {name}", inputs, outputs, contiguous=True)

        return launch

    def attention(queries: mx.array, keys: mx.array, values: mx.array, **how: Any):
        others = [a for a in how.values() if isinstance(a, mx.array)]
        shape = (*queries.shape[:3], values.shape[3])
        inputs = [queries, keys, values, *others]
        outputs = [(shape, queries.dtype)]
        return trace.stand_in("attention", inputs, outputs, contiguous=False)[0]

    def contiguous(array: mx.array) -> mx.array:
        # Cannot be exported. Ours are asked for where they mostly are a copy.
        out = [(array.shape, array.dtype)]
        return trace.stand_in("Contiguous", [array], out, contiguous=False)[0]

    def forget_kernels() -> None:
        for make in KERNELS:
            make.cache_clear()

    forget_kernels()
    with (
        mock.patch.dict(os.environ, TOVA_MLX_KERNELS="on"),
        mock.patch.object(mx.fast, "metal_kernel", metal_kernel),
        mock.patch.object(mx.fast, "scaled_dot_product_attention", attention),
        mock.patch.object(mx.metal, "is_available", return_value=True),
        mock.patch.object(mx, "default_device", return_value=mx.Device(mx.gpu)),
        mock.patch.object(mx, "contiguous", contiguous),
    ):
        yield
    forget_kernels()


def make_model() -> Any:
    """A model in half precision, for its shapes."""
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=HEADS * HEAD_DIM,
            num_hidden_layers=LAYERS,
            intermediate_size=64,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            rms_norm_eps=1e-5,
            vocab_size=50,
        )
    )
    model.set_dtype(mx.float16)
    mx.eval(model.parameters())
    return model


def left_in(cache: Any) -> list[mx.array]:
    """All arrays that a step leaves in a cache."""
    if not hasattr(cache, "rule"):
        return arrays_in((cache.keys, cache.values))
    if isinstance(cache, BatchPolicyKVCache):
        return arrays_in(cache.state)
    slots = cache.slots
    known = [a for e in slots.arrays for a in arrays_of(e)]
    return [*known, *slots.journal.arrays]


def arrays_in(value: Any) -> list[mx.array]:
    """All arrays of a state, or of mlx-lm's keys or values."""
    if isinstance(value, list | tuple):
        return [a for part in value for a in arrays_in(part)]
    return [value] if isinstance(value, mx.array) else []


def count(model: Any, caches: list[Any], tokens: mx.array) -> collections.Counter[str]:
    """What one call of the model launches, with caches that hold something."""
    trace = Trace()

    def step(tokens: mx.array) -> list[mx.array]:
        logits = model(tokens, cache=caches)
        return [logits, *(a for c in caches for a in left_in(c))]

    with on_metal(trace):
        trace.run(step, tokens)
    return trace.launches


def fill(model: Any, caches: list[Any], batch: int, n: int) -> list[Any]:
    """Have a model read n tokens and a step more."""
    tokens = mx.zeros((batch, n), mx.int32)
    model(tokens, cache=caches)
    model(tokens[:, :1], cache=caches)
    mx.eval([a for c in caches for a in left_in(c)])
    return caches


def baseline(kv_bits: int | None, batch: int) -> list[Any]:
    """mlx-lm's own caches for the same."""
    if batch > 1:
        return [BatchKVCache([0] * batch) for _ in range(LAYERS)]
    if kv_bits:
        return [QuantizedKVCache(64, kv_bits) for _ in range(LAYERS)]
    return [KVCache() for _ in range(LAYERS)]


def ours(
    model: Any, policy: str, limit: int, journal: int, kv_bits: int | None, batch: int
) -> list[Any]:
    """Our caches, after more tokens than they hold."""
    how = {"policy": policy, "journal": journal, "kv_bits": kv_bits}
    rows = [
        fill(model, make_prompt_cache(model, limit, **how), 1, limit + 9)
        for _ in range(batch)
    ]
    if batch == 1:
        return rows[0]
    merged = [row[0].merge(list(row)) for row in zip(*rows, strict=True)]
    return fill(model, merged, batch, 1)


def beyond(
    got: collections.Counter[str], plain: collections.Counter[str]
) -> dict[str, float]:
    """Launches per layer beyond those of mlx-lm's cache, where there is a difference.

    Fewer of a kind count as less.
    """
    names = sorted(got.keys() | plain.keys())
    differences = {n: (got[n] - plain[n]) / LAYERS for n in names}
    return {n: d for n, d in differences.items() if d}


def decode_rows(model: Any, limit: int) -> Iterator[dict[str, Any]]:
    """What a step launches beyond mlx-lm's cache: policies, journals, bits, batches."""
    for kv_bits, batch in ((None, 1), (4, 1), (None, 3)):
        tokens = mx.zeros((batch, 1), mx.int32)
        theirs = fill(model, baseline(kv_bits, batch), batch, limit - 1)
        plain = count(model, theirs, tokens)
        for policy in POLICIES:
            for journal in (0, 16) if batch == 1 else (0,):
                caches = ours(model, policy, limit, journal, kv_bits, batch)
                more = beyond(count(model, caches, tokens), plain)
                row = {"what": "step", "policy": policy, "journal": journal}
                row |= {"kv_bits": kv_bits, "batch": batch}
                yield row | {"launches": sum(more.values()), "by": more}
    theirs = fill(model, [RotatingKVCache(limit) for _ in range(LAYERS)], 1, limit + 9)
    tokens = mx.zeros((1, 1), mx.int32)
    plain = count(model, fill(model, baseline(None, 1), 1, limit - 1), tokens)
    more = beyond(count(model, theirs, tokens), plain)
    row = {"what": "step", "policy": "rotating", "journal": None, "kv_bits": None}
    yield row | {"batch": 1, "launches": sum(more.values()), "by": more}


def block_rows(model: Any, limit: int) -> Iterator[dict[str, Any]]:
    """What a block of a prompt launches beyond mlx-lm's cache."""
    tokens = mx.zeros((1, BLOCK), mx.int32)
    plain = count(model, fill(model, baseline(None, 1), 1, limit - 1), tokens)
    for policy in POLICIES:
        caches = ours(model, policy, limit, 0, None, 1)
        more = beyond(count(model, caches, tokens), plain)
        row = {"what": "block", "policy": policy, "journal": 0, "kv_bits": None}
        yield row | {"batch": 1, "launches": sum(more.values()), "by": more}


def timed(model: Any, limit: int, repeats: int = 60) -> dict[str, float]:
    """Microseconds of a step per layer beyond `KVCache`'s, medians, interleaved."""
    cases = {"KVCache": fill(model, baseline(None, 1), 1, limit - 1)}
    for policy in POLICIES:
        cases[policy] = ours(model, policy, limit, 0, None, 1)
    token, times = mx.zeros((1, 1), mx.int32), {name: [] for name in cases}
    for repeat in range(repeats + 5):
        for name, caches in cases.items():
            if name == "KVCache":
                for cache in caches:
                    cache.trim(1)
            start = time.perf_counter()
            mx.eval(model(token, cache=caches))
            if repeat >= 5:
                times[name].append(1e6 * (time.perf_counter() - start) / LAYERS)
    plain = statistics.median(times.pop("KVCache"))
    return {name: statistics.median(t) - plain for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument(
        "--real", action="store_true", help="Time steps on this machine too."
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    # What a model compiles is the same with any cache, and cannot be exported.
    mx.disable_compile()
    model = make_model()
    real = timed(model, options.limit) if options.real else {}
    rows = []
    print(f"{'':<7}{'policy':<11}{'journal':>7}{'bits':>6}{'batch':>7}{'launches':>10}")
    for make in (decode_rows, block_rows):
        for row in make(model, options.limit):
            journal = "-" if row["journal"] is None else row["journal"]
            print(
                f"{row['what']:<7}{row['policy']:<11}{journal:>7}"
                f"{row['kv_bits'] or '-':>6}{row['batch']:>7}{row['launches']:>10g}  "
                + ", ".join(f"{name} {n:+g}" for name, n in row["by"].items()),
                flush=True,
            )
            plain = row["what"] == "step" and not row["journal"] and row["batch"] == 1
            if plain and not row["kv_bits"] and row["policy"] in real:
                row["us_beyond_kvcache"] = real[row["policy"]]
            rows.append(row)
    finish({**provenance(), "limit": options.limit, "rows": rows}, options.out)


if __name__ == "__main__":
    main()
