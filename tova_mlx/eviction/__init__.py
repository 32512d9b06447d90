"""Who leaves: one step at a time (decode) and replayed over a block (prefill)."""

from .choice import kernels_wanted, scan_block
from .kernels import step_on_gpu
from .keys import directions, key_scores, scan_keys
from .once import cut_once
from .scan import ScanResult
from .step import choose_victim, step_on_cpu, update_scores
from .window import window_columns, window_mask

__all__ = [
    "ScanResult",
    "choose_victim",
    "cut_once",
    "directions",
    "kernels_wanted",
    "key_scores",
    "scan_block",
    "scan_keys",
    "step_on_cpu",
    "step_on_gpu",
    "update_scores",
    "window_columns",
    "window_mask",
]
