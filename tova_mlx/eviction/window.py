"""Who is held when the oldest unprotected token always leaves, in closed form.

The first `n_sinks` tokens and the newest `max_size - n_sinks`. Nothing else need be
known, so models whose attention we never see can use it.
"""

import numpy as np
import numpy.typing as npt

from ..policies import Rule


def window_mask(rule: Rule, offset: int, length: int) -> npt.NDArray[np.bool_]:
    """Whom each of L new rows sees after `offset` tokens: bool [L, held + L]."""
    assert rule.max_size is not None
    recent = rule.max_size - rule.n_sinks
    seen = np.arange(offset)
    held = np.concatenate([seen[: rule.n_sinks], seen[rule.n_sinks :][-recent:]])
    rows = np.arange(offset, offset + length)
    columns = np.concatenate([held, rows])
    stays = (columns < rule.n_sinks) | (columns >= rows[:, None] - recent)
    return stays & (columns <= rows[:, None])


def window_columns(rule: Rule, n: int) -> npt.NDArray[np.int32]:
    """The columns that stay of n > max_size columns in order of position."""
    assert rule.max_size is not None
    newest = np.arange(n - (rule.max_size - rule.n_sinks), n)
    return np.concatenate([np.arange(rule.n_sinks), newest]).astype(np.int32)
