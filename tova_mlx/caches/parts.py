"""What of a batch's arrays is one row's."""

from typing import Any, NamedTuple

import mlx.core as mx

from ..storage.entries import Entries


class Part(NamedTuple):
    """What a row's update gave, and where that lies in the batch's arrays."""

    queries: slice
    columns: slice
    keys: Entries
    values: Entries


def mask_of_row(mask: Any, row: int, part: Part) -> Any:
    if not isinstance(mask, mx.array):
        return mask
    mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
    if mask.shape[0] > 1:
        mask = mask[row : row + 1]
    # One row for all queries, say: cut only what is there.
    queries = part.queries if mask.shape[2] > 1 else slice(None)
    columns = part.columns if mask.shape[3] > 1 else slice(None)
    return mask[:, :, queries, columns]
