"""Which tokens are held when the oldest unprotected one is always evicted.

In closed form: the first `n_sinks` tokens and the newest `max_size - n_sinks`. Nothing
else need be known, so models whose attention we never see can use it.
"""

import numpy as np
import numpy.typing as npt

from ..policies import Rule


def window_mask(rule: Rule, offset: int, length: int) -> npt.NDArray[np.bool_]:
    """Which columns each of L new tokens sees after `offset`: bool [L, held + L]."""
    assert rule.max_size is not None
    recent = rule.max_size - rule.n_sinks
    seen = np.arange(offset)
    held = np.concatenate([seen[: rule.n_sinks], seen[rule.n_sinks :][-recent:]])
    new = np.arange(offset, offset + length)
    columns = np.concatenate([held, new])
    visible = (columns < rule.n_sinks) | (columns >= new[:, None] - recent)
    return visible & (columns <= new[:, None])


def window_columns(rule: Rule, n: int) -> npt.NDArray[np.int32]:
    """Return the columns held of n > max_size columns in order of position."""
    assert rule.max_size is not None
    newest = np.arange(n - (rule.max_size - rule.n_sinks), n)
    return np.concatenate([np.arange(rule.n_sinks), newest]).astype(np.int32)
