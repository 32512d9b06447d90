"""fade: keeps the tokens most attended lately, weighted by the norm of the value.

Scores fade by 0.9 a token. A quarter of `max_size` is protected as recent.

Source: forgetting factor from A2SF, arXiv 2407.20485; value norms from VATP,
arXiv 2406.12335.
Differs from the source: the combination and its constants were set here, on the
perplexity of long texts.
"""

from .base import Policy

FADE = Policy(
    name="fade",
    keeps="most attended lately, weighted by the norm of the value; a quarter newest",
    source="A2SF, arXiv 2407.20485, and VATP, arXiv 2406.12335; combined here",
    reads_attention=True,
    memory=0.9,
    value_weighted=True,
    recent_share=0.25,
)
