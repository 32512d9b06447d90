"""What MLX puts before every kernel, from the headers in its wheel.

With stand-ins for two headers that only Apple's compiler takes, see shim/mlx_headers.
"""

import functools
import re
from pathlib import Path

import mlx.core as mx

_HEADERS = Path(mx.__file__).parent / "include/mlx/backend/metal/kernels"
_STAND_INS = Path(__file__).parent / "shim/mlx_headers"
# In the order in which MLX's utils.h includes them.
_NAMES = ("bf16", "bf16_math", "complex", "defines", "logging", "utils")
_COMPLEX_LIMITS = re.compile(
    r"template <typename T>\nstruct Limits<complex_t<T>> \{.*?\n\};\n", re.S
)
_COMPLEX_FUNCTION = re.compile(r"^inline complex64_t\b.*?^\}\n", re.S | re.M)
_INCLUDE = re.compile(r'#include "mlx[^"]*"|#pragma once')


@functools.cache
def preamble() -> str:
    """The headers in one text."""
    return "#include <metal_stdlib>\n" + "".join(map(_header, _NAMES))


def _header(name: str) -> str:
    path = _STAND_INS / f"{name}.h"
    if not path.exists():
        path = _HEADERS / f"{name}.h"
    text = path.read_text(encoding="utf-8")
    for pattern in (_COMPLEX_FUNCTION, _COMPLEX_LIMITS, _INCLUDE):
        text = pattern.sub("", text)
    return f'#line 1 "{name}.h"\n{text}\n'
