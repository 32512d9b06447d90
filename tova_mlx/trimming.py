"""mlx-lm's trimming, for caches that can take back their newest tokens only.

mlx-lm asks `is_trimmable()`, which knows no number, and trims nothing if the answer is
no. `install` puts in its place what asks our caches for the number. Speculative
decoding ignores that nothing was trimmed and would go on with rejected tokens, so
there it raises.
"""

import sys
from typing import Any

from mlx_lm.models import cache as mlx_lm_cache

from .errors import CacheStateError
from .layers import leaves

_NAME = "trim_prompt_cache"
_GENERATE = "mlx_lm.generate"
_original = mlx_lm_cache.trim_prompt_cache


def trim_prompt_cache(cache: list[Any], num_tokens: int) -> int:
    """Take back the newest tokens of all layers; how many: 0 if a layer cannot."""
    if not any(hasattr(c, "can_trim") for c in leaves(cache)):
        return _original(cache, num_tokens)  # type: ignore[return-value]
    if not all(_can_trim(c, num_tokens) for c in leaves(cache)):
        return 0
    taken = [c.trim(num_tokens) for c in cache]
    return taken[0]


def trim_or_raise(cache: list[Any], num_tokens: int) -> int:
    """The same; CacheStateError if a layer of ours is among those that cannot."""
    ours = [c for c in leaves(cache) if hasattr(c, "can_trim")]
    can = all(_can_trim(c, num_tokens) for c in leaves(cache))
    if ours and num_tokens > 0 and not can:
        raise CacheStateError(
            f"{ours[0].rule.policy}: {num_tokens} drafted tokens cannot be taken back "
            f"with max_size={ours[0].max_size}. Convert with journal={num_tokens} or "
            "more, or draft fewer tokens."
        )
    return trim_prompt_cache(cache, num_tokens)


def install() -> None:
    """Replace mlx-lm's function wherever it was imported."""
    for name, module in list(sys.modules.items()):
        if getattr(module, "__dict__", {}).get(_NAME) is _original:
            new = trim_or_raise if name == _GENERATE else trim_prompt_cache
            setattr(module, _NAME, new)


def uninstall() -> None:
    """Put mlx-lm's own function back everywhere."""
    for module in list(sys.modules.values()):
        held = getattr(module, "__dict__", {}).get(_NAME)
        if held in (trim_prompt_cache, trim_or_raise) and module.__name__ != __name__:
            setattr(module, _NAME, _original)


def _can_trim(cache: Any, n: int) -> bool:
    ask = getattr(cache, "can_trim", None)
    return cache.is_trimmable() if ask is None else ask(n)
