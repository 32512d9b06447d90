"""vatp: h2o with every weight multiplied by the norm of the token's value.

Per KV head, half of `max_size` protected as recent.

Source: VATP on H2O, arXiv 2406.12335, equation 4.
Differs from the source: the L2 norm, they use L1; the first tokens are not protected
(`n_sinks` does that).
"""

from .base import Policy

VATP = Policy(
    name="vatp",
    keeps="h2o with each weight multiplied by the norm of the value",
    source="VATP on H2O, arXiv 2406.12335",
    reads_attention=True,
    granularity="head",
    memory=1.0,
    value_weighted=True,
    recent_share=0.5,
)
