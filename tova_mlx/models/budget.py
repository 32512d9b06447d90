"""A limit in bytes: how many tokens per layer keep all caches of a model within it.

What a cache can reach grows by the same for every token kept, so two traces of the
model at different limits say all. `auto` is what the device can spare.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..caches.options import CacheOptions
from ..errors import OptionError

_UNITS = {
    f"{letter}{i}b": (1024 if i else 1000) ** power
    for power, letter in enumerate("kmgt", start=1)
    for i in ("", "i")
}
_BYTES = re.compile(r"(\d+(?:\.\d+)?) ?([kmgt]i?b)", re.IGNORECASE)
# More than any layer will hold; a policy refuses a limit only for being too small.
_MOST_TOKENS = 2**30
# Two limits between which a cache's bytes grow evenly.
_LOW, _HIGH = 2**20, 2**21
# Tokens that are read at once where nobody says it: mlx-lm's default.
STEP = 2048


class Budget(NamedTuple):
    """Bytes that all caches of a model together may take; None: what can be spared."""

    text: str
    nbytes: int | None

    def __str__(self) -> str:
        return self.text


def parse_size(given: Any) -> Any:
    """Return tokens for a number, a Budget for text like "2GB", "512 MiB" or "auto".

    Anything else comes back as it is, for the policy to judge. Raises OptionError for
    text that is none of these, or more than the machine has.
    """
    if not isinstance(given, str):
        return given
    text = given.strip()
    if text.lower() == "auto":
        return Budget("auto", None)
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    nbytes = parse_bytes(text)
    if nbytes is None:
        raise OptionError(
            f"max_kv_size={given!r} is not a size. Use a number of tokens, bytes such "
            "as 2GB or 512MiB, or auto."
        )
    if nbytes > (there := device_memory()):
        raise OptionError(
            f"max_kv_size={given!r} is more than the {_said(there)} of memory that "
            "this machine has. Use less, or auto."
        )
    return Budget(text, nbytes)


def parse_bytes(text: str) -> int | None:
    """Return the bytes that text like "2GB" or "512 MiB" stands for, or None."""
    found = _BYTES.fullmatch(text.strip())
    return found and int(float(found[1]) * _UNITS[found[2].lower()])


class Fit(NamedTuple):
    """Tokens per layer that fit, the whole budget in bytes, and why in one line."""

    tokens: int
    nbytes: int
    line: str


def fit(
    model: nn.Module,
    budget: Budget,
    made_for: Callable[[int], CacheOptions],
    most_bytes: Callable[[CacheOptions], int | None],
    *,
    parts: int,
    each: str,
    step: int,
) -> Fit:
    """Return how many tokens a layer may keep.

    made_for: the options of a cache of so many tokens; most_bytes: what all caches with
    options can reach, None without limit; parts: how many sets of caches share the
    budget, and what each is, in words; step: tokens that are read at once.

    Raises OptionError: no limit, or fewer tokens than the policy needs.
    """
    low, high = (most_bytes(made_for(n)) for n in (_LOW, _HIGH))
    if low is None or high is None or low == high:
        raise OptionError(
            f"max_kv_size='{budget}': {made_for(_LOW).rule.policy} does not bound this "
            "model's caches. Use another policy, or leave the budget out."
        )
    per_token = (high - low) // (_HIGH - _LOW)
    fixed = low - per_token * _LOW
    nbytes, why = budget.nbytes, str(budget)
    if nbytes is None:
        # A step holds the keys and values of a layer a few times over.
        nbytes, why = _spare(model, step)
    tokens = min(_MOST_TOKENS, (nbytes // parts - fixed) // per_token)
    least = _fewest(made_for)
    share = f" for each of {parts} {each}" if parts > 1 else ""
    if tokens < least:
        needed = (fixed + least * per_token) * parts
        raise OptionError(
            f"max_kv_size='{budget}' is too small{share}: {made_for(_LOW).rule.policy} "
            f"needs at least {needed:,} bytes here, for {_tokens(least)} per layer. "
            "Use more."
        )
    return Fit(tokens, nbytes, f"{why}: {_tokens(tokens)} per layer{share}")


def _fewest(made_for: Callable[[int], CacheOptions]) -> int:
    """The smallest limit that the policy takes."""
    low, high = 0, 1
    while not _takes(made_for, high):
        low, high = high, 2 * high
        if high > _MOST_TOKENS:
            # Raises what is wrong.
            made_for(high)
    while high - low > 1:
        middle = (low + high) // 2
        if _takes(made_for, middle):
            high = middle
        else:
            low = middle
    return high


def _takes(made_for: Callable[[int], CacheOptions], tokens: int) -> bool:
    try:
        made_for(tokens)
    except OptionError:
        return False
    return True


def device_memory() -> int:
    """Bytes that the device can use for MLX's arrays."""
    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def weights_bytes(model: nn.Module) -> int:
    """Bytes that a model's parameters take."""
    leaves: Any = tree_flatten(model.parameters())
    return sum(a.nbytes for _, a in leaves)


def _spare(model: nn.Module, step: int) -> tuple[int, str]:
    """Bytes that are left for caches, and the sum in words."""
    leaves: Any = tree_flatten(model.parameters())
    weights = weights_bytes(model)
    # Of the widest layers: their input, output and two of the kind between.
    widest = max(sum(a.shape) for _, a in leaves if a.ndim == 2 and a.shape[0] < 2**16)
    size = max(a.dtype.size for _, a in leaves)
    passing = 4 * step * widest * size
    if mx.metal.is_available():
        there, what = device_memory(), "working set"
        # The weights are in it.
        left, weighed = there - weights, f" - {_said(weights)} weights"
    else:
        there, what = _free_memory(), "free memory"
        left, weighed = there, ""
    nbytes = int(0.9 * (left - passing))
    sum_of = f"{_said(there)} {what}{weighed} - {_said(passing)} for a step of {step}"
    return nbytes, f"auto: 90 % of ({sum_of}) = {_said(max(0, nbytes))}"


def _free_memory() -> int:
    """Bytes that Linux can give without swapping, within a container's limit."""
    known = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines()
    )
    free = 1024 * int(known["MemAvailable"].split()[0])
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return min(free, max(0, limit - used))


def _tokens(n: int) -> str:
    return f"{n:,} token{'s' if n > 1 else ''}"


def _said(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
