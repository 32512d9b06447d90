"""MLX's own Metal source for a kernel call, without Metal.

`mx.export_function` traces a call and shows every primitive with its arguments; for a
custom kernel these are the generated source, the grid and what was asked for about
shapes. So signature, address spaces and template instantiation are MLX's, not ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Record:
    """One call of a custom kernel.

    Attributes:
        name: of the Metal function, template arguments included.
        source: the header, the function, its instantiation.
        grid, threadgroup: in threads, as given.
        wanted: per input, whether shape, strides and ndim are arguments too.
        ensure_row_contiguous: whether inputs are copied if they are not.
    """

    name: str
    source: str
    grid: Triple
    threadgroup: Triple
    wanted: tuple[tuple[bool, bool, bool], ...]
    ensure_row_contiguous: bool


def record(call: Callable[..., Any], inputs: Sequence[mx.array]) -> Record:
    """The one custom kernel that call(*inputs) adds to the graph."""
    found: list[Record] = []

    def look(event: dict[str, Any]) -> None:
        if event.get("type") != "primitive" or event["name"] != "CustomKernel":
            return
        name, source, *rest = event["arguments"]
        found.append(
            Record(
                name=name,
                source=source,
                grid=(rest[0], rest[1], rest[2]),
                threadgroup=(rest[3], rest[4], rest[5]),
                wanted=tuple(rest[6]),
                ensure_row_contiguous=rest[7],
            )
        )

    mx.export_function(look, call, *inputs)
    assert len(found) == 1, f"expected one kernel, got {len(found)}"
    return found[0]
