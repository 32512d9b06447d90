"""Kinds of values on the command line."""

import os
import re
from math import isfinite
from pathlib import Path
from typing import Any

import click

from ..errors import OptionError
from ..policies import POLICIES


class UserPath(click.Path):
    """A path of which a leading ~ is expanded; shells leave it in --option=~/file."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)


class Finite(click.FloatRange):
    """A range without nan, which no comparison refuses, and without infinity."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        number = super().convert(value, param, ctx)
        if not isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class PolicyName(click.ParamType):
    """The name of a policy, of this package or any that is registered."""

    name = "policy"

    def get_metavar(self, param: click.Parameter, ctx: Any = None) -> str:
        return f"[{'|'.join(POLICIES)}]"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        if value not in POLICIES:
            known = ", ".join(map(repr, POLICIES))
            self.fail(f"{value!r} is not one of {known}.", param, ctx)
        return value


class KVBits(click.ParamType):
    """Bits of quantised keys and values: one number for both, or a pair."""

    name = "BITS[,BITS]"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        # Not before: it imports MLX.
        from ..storage.formats import BEST, choices, storage_for

        words = str(value).split(",")
        bits = [int(word) if word.isdecimal() else word for word in words]
        bits = bits[0] if len(bits) == 1 else tuple(bits)
        try:
            storage_for(bits, 64)
        except OptionError:
            alone, pairs = (", ".join(map(str, c)) for c in (BEST, choices()))
            self.fail(f"use {alone}, or a pair like 6h,4 of {pairs}", param, ctx)
        return bits


class KVSize(click.ParamType):
    """Tokens kept per layer, or a budget: bytes that all caches may take, or auto."""

    name = "TOKENS|BYTES|auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if isinstance(value, int) or re.fullmatch(r"[+-]?\d+", value):
            return click.IntRange(min=1).convert(value, param, ctx)
        # Not before: it imports MLX.
        from ..models.budget import parse_size

        try:
            return parse_size(value)
        except OptionError as error:
            self.fail(str(error).removeprefix("max_kv_size="), param, ctx)


class Bytes(click.ParamType):
    """A number of bytes, such as 8GB or 512MiB."""

    name = "BYTES"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        # Not before: it imports MLX.
        from ..models.budget import parse_bytes

        nbytes = parse_bytes(value) if isinstance(value, str) else value
        if not nbytes:
            self.fail(f"{value} is no size such as 8GB or 512MiB.", param, ctx)
        return nbytes


TEXT_FILE = UserPath(exists=True, dir_okay=False, path_type=Path)
