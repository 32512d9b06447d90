"""The policies, and the one table that names them."""

from collections.abc import Mapping
from typing import Any

from ..errors import OptionError
from .base import ATTENTION_OPTIONS, Granularity, Policy, Rule
from .fade import FADE
from .full import FULL
from .h2o import H2O
from .keydiff import KEYDIFF
from .streaming import STREAMING
from .tova import TOVA
from .vatp import VATP
from .window import WINDOW

POLICIES: dict[str, Policy] = {
    p.name: p for p in (FULL, WINDOW, STREAMING, H2O, TOVA, VATP, FADE, KEYDIFF)
}


def settle(policy: str, max_size: int | None, options: Mapping[str, Any]) -> Rule:
    """The rule for a policy's name, `max_size` in tokens and its options.

    Raises OptionError, naming what to do instead.
    """
    if policy not in POLICIES:
        raise OptionError(
            f"policy {policy!r} is not known. Use one of: {', '.join(POLICIES)}."
        )
    return POLICIES[policy].settle(max_size, options)


__all__ = ["ATTENTION_OPTIONS", "POLICIES", "Granularity", "Policy", "Rule", "settle"]
