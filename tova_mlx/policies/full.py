"""full: keeps everything. The control that the others are compared with.

`max_size` is accepted, so that comparisons can loop over policies, and not read.

Source: none; the transformer's ordinary cache.
Differs from the source: nothing known.
"""

from .base import Policy

FULL = Policy(name="full", keeps="everything (the control)", source="–", bounded=False)
