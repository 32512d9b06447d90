"""streaming: keeps the first `n_sinks` tokens and the newest.

Source: StreamingLLM, arXiv 2309.17453; "Window+i" in arXiv 2401.06104.
Differs from the source: keys keep the positions they were rotated with; StreamingLLM
renumbers them inside the cache.
"""

from .base import Policy

STREAMING = Policy(
    name="streaming",
    keeps="the first `n_sinks` (4) tokens and the newest",
    source="StreamingLLM, arXiv 2309.17453",
    n_sinks=4,
)
