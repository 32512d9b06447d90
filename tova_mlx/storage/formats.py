"""How a cache stores keys and values: as they come, or quantised.

A storage format is a frozen dataclass like `Format`, in a file of its own, and an entry
of `FORMATS`. Nothing else knows which there are.
"""

from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

import mlx.core as mx

from ..errors import OptionError
from .affine import Affine
from .entries import Entries, Quantized

# What stands for a format in `kv_bits`.
Bits: TypeAlias = int | str


class Format(Protocol):
    """One way to quantise keys or values."""

    # What stands for its kinds in the option `kv_bits`, as in 4 or "mxfp4".
    choices: ClassVar[tuple[Bits, ...]]

    @classmethod
    def of(cls, choice: Any, group_size: int) -> "Format":
        """Return the kind that a choice stands for.

        group_size: how many numbers share a scale.
        """
        ...

    @property
    def choice(self) -> Bits:
        """The choice that stands for it."""
        ...

    def quantize(self, entries: mx.array) -> Quantized:
        """Return entries [B, n_kv_heads, S, head_dim]. Raises OptionError."""
        ...

    def from_state(self, arrays: Iterable[Any]) -> Quantized:
        """Return the entries of these arrays. Raises ValueError, TypeError."""
        ...


FORMATS: list[type[Format]] = [Affine]


class Storage(NamedTuple):
    """The format of keys and that of values, None as they come."""

    keys: Format | None = None
    values: Format | None = None
    group_size: int = 64

    @property
    def is_plain(self) -> bool:
        """Whether keys and values are stored as they come."""
        return self.keys is None and self.values is None

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
        """What `from_json` takes: what stands for each format, and the group size."""
        bits = self.options().get("kv_bits", (None, None))
        return [*bits, self.group_size]

    @staticmethod
    def from_json(given: Any) -> "Storage":
        """Raises ValueError, TypeError or OptionError for what is not one."""
        *bits, group_size = given
        stored = storage_for(bits if any(bits) else None, group_size)
        if stored.as_json() != [*given]:
            raise ValueError(f"storage {given}")
        return stored


PLAIN = Storage()


def _stored(form: Format | None, entries: mx.array) -> Entries:
    return entries if form is None else form.quantize(entries)


def storage_for(kv_bits: Any, kv_group_size: Any) -> Storage:
    """Return what the public options ask for. Raises OptionError."""
    if kv_bits is None:
        return PLAIN
    if type(kv_group_size) is not int or kv_group_size not in (32, 64):
        raise OptionError(
            f"kv_group_size={kv_group_size!r} is not possible. Use 32 or 64."
        )
    pair = kv_bits if isinstance(kv_bits, (tuple, list)) else (kv_bits, kv_bits)
    forms = [f for choice in pair if (f := _form(choice, kv_group_size))]
    if not len(forms) == len(pair) == 2:
        known = ", ".join(str(c) for form in FORMATS for c in form.choices)
        raise OptionError(
            f"kv_bits={kv_bits!r} is not possible. Use {known} or a pair for keys and "
            "values like (8, 4)."
        )
    keys, values = forms
    return Storage(keys, values, kv_group_size)


def _form(choice: Any, group_size: int) -> Format | None:
    """The format that a choice stands for; True and 4.0 are none."""
    if type(choice) not in (int, str):
        return None
    known = (form for form in FORMATS if choice in form.choices)
    form = next(known, None)
    return form and form.of(choice, group_size)
