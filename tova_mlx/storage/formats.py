"""How a cache stores keys and values: as they come, or quantised.

A storage format is a `Format` in a file of its own, and an entry of `FORMATS`. Nothing
else knows which there are.
"""

from typing import Any, NamedTuple

import mlx.core as mx

from ..errors import OptionError
from .affine import Affine
from .entries import Entries
from .format import Bits, Format
from .hadamard import Hadamard

FORMATS: list[type[Format]] = [Affine, Hadamard]

# What a single number stands for: the keys and values that measured best at about that
# size, see docs/results.md.
BEST: dict[int, tuple[Bits, Bits]] = {
    4: ("6h", 4),
    5: ("6h", 5),
    6: ("8h", 4),
    8: ("8h", 8),
}

# By how many percent they change the perplexity, from – to: two models, two novels,
# fade and tova at 512 of 4,096 tokens (results/bits). A test holds them to the rows.
CHANGES: dict[int, tuple[float, float]] = {4: (0.0, 1.6), 8: (-0.2, 0.4)}


class Storage(NamedTuple):
    """The format of keys and that of values, None as they come."""

    keys: Format | None = None
    values: Format | None = None
    group_size: int = 64

    @property
    def is_plain(self) -> bool:
        """Whether keys and values are stored as they come."""
        return self.keys is None and self.values is None

    @property
    def fits(self) -> bool:
        """Whether `fitted` gives others."""
        return any(form is not None and form.fits for form in (self.keys, self.values))

    def fitted(self, keys: mx.array, values: mx.array) -> "Storage":
        """Return formats fitted to keys and values [1, n_kv_heads, S, head_dim]."""
        if self.keys is None or self.values is None:
            return self
        return self._replace(
            keys=self.keys.fitted(keys), values=self.values.fitted(values)
        )

    def widened(self) -> "Storage":
        """Return more bits for keys, by which all values are weighed."""
        return self._replace(keys=self.keys and self.keys.widened())

    def store(self, keys: mx.array, values: mx.array) -> tuple[Entries, Entries]:
        """Return keys and values in their formats."""
        return _stored(self.keys, keys), _stored(self.values, values)

    def options(self) -> dict[str, Any]:
        """The public options that give this storage."""
        if self.keys is None or self.values is None:
            return {}
        bits = (self.keys.choice, self.values.choice)
        return {"kv_bits": bits, "kv_group_size": self.group_size}

    def as_json(self) -> list[Any]:
        """What `from_json` takes.

        What stands for each format, the group size and, if there are any, constants.
        """
        bits = self.options().get("kv_bits", (None, None))
        constants = [form and form.constant for form in (self.keys, self.values)]
        return [*bits, self.group_size, *(constants if any(constants) else ())]

    @staticmethod
    def from_json(given: Any) -> "Storage":
        """Raises ValueError, TypeError or OptionError for what is not one."""
        keys, values, group_size, *constants = given
        bits = (keys, values) if keys or values else None
        stored = storage_for(bits, group_size, constants or (None, None))
        if stored.as_json() != [*given]:
            raise ValueError(f"storage {given}")
        return stored


PLAIN = Storage()


def _stored(form: Format | None, entries: mx.array) -> Entries:
    return entries if form is None else form.quantize(entries)


def storage_for(
    kv_bits: Any, kv_group_size: Any, constants: Any = (None, None)
) -> Storage:
    """Return what the public options ask for. Raises OptionError.

    constants: of the keys' and the values' format, if they were fitted.
    """
    if kv_bits is None:
        return PLAIN
    if type(kv_group_size) is not int or kv_group_size not in (32, 64):
        raise OptionError(
            f"kv_group_size={kv_group_size!r} is not possible. Use 32 or 64."
        )
    pair = kv_bits if isinstance(kv_bits, (tuple, list)) else _pair(kv_bits)
    kinds = [kind for choice in pair if (kind := _kind(choice))]
    if not len(kinds) == len(pair) == 2:
        alone, pairs = (", ".join(map(str, c)) for c in (BEST, choices()))
        raise OptionError(
            f"kv_bits={kv_bits!r} is not possible. Use {alone}, or a pair of {pairs} "
            "for keys and values, like (8, 4)."
        )
    keys, values = (
        kind.of(choice, kv_group_size, constant)
        for kind, choice, constant in zip(kinds, pair, constants, strict=True)
    )
    return Storage(keys, values, kv_group_size)


def choices() -> list[Bits]:
    """Return what may stand in a pair."""
    return [choice for form in FORMATS for choice in form.choices]


def _pair(single: Any) -> tuple[Any, Any]:
    """What one choice for keys and values stands for; True and 4.0 are no 4."""
    same = (single, single)
    return BEST.get(single, same) if type(single) is int else same


def _kind(choice: Any) -> type[Format] | None:
    if type(choice) not in (int, str):
        return None
    return next((form for form in FORMATS if choice in form.choices), None)
