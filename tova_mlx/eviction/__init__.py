"""Who leaves: one step at a time (decode) and replayed over a block (prefill)."""

from .scan import ScanResult, scan
from .step import choose_victim, update_scores
from .window import window_columns, window_mask

__all__ = [
    "ScanResult",
    "choose_victim",
    "scan",
    "update_scores",
    "window_columns",
    "window_mask",
]
