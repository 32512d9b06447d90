"""keydiff: keeps the keys that are least like the mean key.

Reads no attention, only the keys: a token's score is minus the cosine of its key's
angle to the mean of all unit keys held, per KV head by default. Nothing is protected.

Source: KeyDiff, arXiv 2504.15364, section 3.
Differs from the source: exact token by token during prefill, where the released code
cuts once a block; the mean over the KV heads with granularity "layer".
"""

from .base import Policy

KEYDIFF = Policy(
    name="keydiff",
    keeps="the keys least similar to the mean key",
    source="KeyDiff, arXiv 2504.15364",
    options=("granularity", "n_sinks", "n_recent"),
    reads_keys=True,
    granularity="head",
)
