"""mlx-lm's trimming, for caches that can take back their newest tokens only.

mlx-lm asks `is_trimmable()`, which knows no number, and trims nothing if the answer is
no. `install` puts in its place what asks our caches for the number. Speculative
decoding ignores that nothing was trimmed and would go on with rejected tokens, so
there it raises; and it must not be refused for what it will never ask to take back.
"""

import sys
from typing import Any

from mlx_lm.models import cache as mlx_lm_cache

from ..errors import CacheStateError
from . import replacing
from .layers import leaves, seen

# Always loaded: mlx-lm's package imports it.
_GENERATE = "mlx_lm.generate"
_TRIM, _CAN_TRIM = "trim_prompt_cache", "can_trim_prompt_cache"


@replacing.stands_for(mlx_lm_cache, _TRIM)
def trim_prompt_cache(cache: list[Any], num_tokens: int) -> int:
    """Take back the newest tokens of all layers; how many: 0 if a layer cannot.

    After a forward that was interrupted some layers have seen less than others; they
    give back less, so that all are where `num_tokens` ago the foremost was.
    """
    if not any(hasattr(c, "can_trim") for c in leaves(cache)):
        return replacing.original(trim_prompt_cache)(cache, num_tokens)
    parts = _parts(cache, num_tokens)
    if num_tokens <= 0 or not all(_can_trim(c, n) for c, n in parts):
        return 0
    return max(c.trim(n) if n else 0 for c, n in parts)


@replacing.stands_for(mlx_lm_cache, _TRIM)
def trim_or_raise(cache: list[Any], num_tokens: int) -> int:
    """The same; CacheStateError if a layer of ours is among those that cannot."""
    ours = [c for c in leaves(cache) if hasattr(c, "can_trim")]
    can = all(_can_trim(c, n) for c, n in _parts(cache, num_tokens))
    if ours and num_tokens > 0 and not can:
        raise CacheStateError(
            f"{ours[0].rule.policy}: {num_tokens} drafted tokens cannot be taken back "
            f"with max_size={ours[0].max_size}. Convert with journal={num_tokens} or "
            "more, or draft fewer tokens."
        )
    return trim_prompt_cache(cache, num_tokens)


@replacing.stands_for(mlx_lm_cache, _CAN_TRIM)
def can_rewind_prompt_cache(cache: list[Any]) -> bool:
    """Whether the tokens that come next, drafts, could be taken back."""
    return all(getattr(c, "journal", 0) or c.is_trimmable() for c in leaves(cache))


def install() -> None:
    """Replace mlx-lm's functions wherever they were imported."""
    generate = sys.modules[_GENERATE]
    if (
        getattr(mlx_lm_cache, _TRIM) is trim_prompt_cache
        and getattr(generate, _TRIM) is trim_or_raise
        and getattr(generate, _CAN_TRIM) is can_rewind_prompt_cache
    ):
        return
    replacing.replace(mlx_lm_cache, _TRIM, trim_prompt_cache)
    replacing.replace(mlx_lm_cache, _TRIM, trim_or_raise, only_in=_GENERATE)
    replacing.replace(
        mlx_lm_cache, _CAN_TRIM, can_rewind_prompt_cache, only_in=_GENERATE
    )


def uninstall() -> None:
    """Put mlx-lm's own functions back everywhere."""
    for name in (_TRIM, _CAN_TRIM):
        replacing.put_back(mlx_lm_cache, name)


def _parts(cache: list[Any], num_tokens: int) -> list[tuple[Any, int]]:
    """Each layer's cache, and how many of `num_tokens` it has to give back."""
    caches = list(leaves(cache))
    newest = max((c.seen for c in caches if hasattr(c, "can_trim")), default=0)

    def behind(c: Any) -> int:
        n = seen(c)
        return newest - n if isinstance(n, int) else 0

    return [(c, max(0, num_tokens - behind(c))) for c in caches]


def _can_trim(cache: Any, n: int) -> bool:
    if n <= 0:
        return True
    ask = getattr(cache, "can_trim", None)
    return cache.is_trimmable() if ask is None else ask(n)
