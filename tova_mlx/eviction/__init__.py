"""Which token is evicted: in a step (decode), and replayed over a block (prefill)."""

from ..storage.device import kernels_wanted
from .choice import scan_block
from .choice_kernel import choose_on_gpu
from .once import cut_once
from .scan import Columns, ScanResult
from .scored import scored_scan, scored_step, scores_of_step
from .step import choose_victim, step_on_cpu, update_scores
from .step_kernel import Step, step_on_gpu
from .window import window_columns, window_mask

__all__ = [
    "Columns",
    "ScanResult",
    "Step",
    "choose_on_gpu",
    "choose_victim",
    "cut_once",
    "kernels_wanted",
    "scan_block",
    "scored_scan",
    "scored_step",
    "scores_of_step",
    "step_on_cpu",
    "step_on_gpu",
    "update_scores",
    "window_columns",
    "window_mask",
]
