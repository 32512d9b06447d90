"""tova: keeps the tokens most attended by the newest query.

The score is the mean attention weight over the heads. No first tokens, no recent
window and no statistics are protected or kept; the newest token may go too.

Source: "Transformers are Multi-State RNNs", arXiv 2401.06104, section 3.
Differs from the source: exact token by token during prefill, where the released code
cuts a chunk once by its last query (that is `prefill="once"`); `granularity="head"`
is an addition.
"""

from .base import Policy

TOVA = Policy(
    name="tova",
    keeps="most attended by the newest query",
    source="TOVA, arXiv 2401.06104",
    reads_attention=True,
)
