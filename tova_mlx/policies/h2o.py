"""h2o: keeps the tokens most attended so far, and the newest half.

Scores are accumulated attention weights, per KV head by default. Half of `max_size`
is protected as recent.

Source: H2O, arXiv 2306.14048, algorithm 1.
Differs from the source: the mean over a KV head's query heads instead of one score
per query head (grouped-query attention came later); exact token by token during
prefill, where the released code cuts once.
"""

from .base import Policy

H2O = Policy(
    name="h2o",
    keeps="half: most attended so far (accumulated); half: newest",
    source="H2O, arXiv 2306.14048",
    reads_attention=True,
    granularity="head",
    memory=1.0,
    recent_share=0.5,
)
