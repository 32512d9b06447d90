"""How a cache stores keys and values: as they come, or quantised.

A format is an object with `quantize(entries)` and `from_state(arrays)`, whose entries
are `entries.Quantized`; None stands for entries as they come.
"""

from typing import Any, NamedTuple

import mlx.core as mx

from ..errors import OptionError
from .affine import Affine
from .entries import Entries


class Storage(NamedTuple):
    """The format of keys and that of values, None as they come."""

    keys: Any = None
    values: Any = None

    @property
    def is_plain(self) -> bool:
        """Whether keys and values are stored as they come."""
        return self.keys is None and self.values is None

    def store(self, keys: mx.array, values: mx.array) -> tuple[Entries, Entries]:
        """Return keys and values in their formats."""
        return _stored(self.keys, keys), _stored(self.values, values)

    def options(self) -> dict[str, Any]:
        """The public options that give this storage."""
        if self.is_plain:
            return {}
        bits = (self.keys.bits, self.values.bits)
        return {"kv_bits": bits, "kv_group_size": self.keys.group_size}

    def as_json(self) -> list[Any]:
        """What `from_json` takes: bits of keys and of values, and group size."""
        options = self.options() or {"kv_bits": (None, None), "kv_group_size": 64}
        return [*options["kv_bits"], options["kv_group_size"]]

    @staticmethod
    def from_json(given: Any) -> "Storage":
        """Raises ValueError, TypeError or OptionError for what is not one."""
        *bits, group_size = given
        stored = storage_for(bits if any(bits) else None, group_size)
        if stored.as_json() != [*given]:
            raise ValueError(f"storage {given}")
        return stored


PLAIN = Storage()


def _stored(form: Any, entries: mx.array) -> Entries:
    return entries if form is None else form.quantize(entries)


def storage_for(kv_bits: Any, kv_group_size: Any) -> Storage:
    """Return what the public options ask for. Raises OptionError."""
    if kv_bits is None:
        return PLAIN
    pair = kv_bits if isinstance(kv_bits, (tuple, list)) else (kv_bits, kv_bits)
    known = all(isinstance(b, int) and b in (4, 8) for b in pair)
    if len(pair) != 2 or not known:
        raise OptionError(
            f"kv_bits={kv_bits!r} is not possible. Use 4, 8 or a pair for keys and "
            "values like (8, 4)."
        )
    if not isinstance(kv_group_size, int) or kv_group_size not in (32, 64):
        raise OptionError(
            f"kv_group_size={kv_group_size!r} is not possible. Use 32 or 64."
        )
    return Storage(*(Affine(bits, kv_group_size) for bits in pair))
