"""window: keeps the newest tokens.

Nothing is protected: the first tokens are evicted first.

Source: "Transformers are Multi-State RNNs", arXiv 2401.06104, section 2 ("Window").
Differs from the source: nothing known.
"""

from .base import Policy

WINDOW = Policy(
    name="window",
    keeps="the newest tokens",
    source="arXiv 2401.06104 §2 (Window)",
    options=(),
)
