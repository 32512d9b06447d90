"""The caches of a model's layers, some of which hold several."""

from collections.abc import Iterable, Iterator
from typing import Any


def leaves(caches: Iterable[Any]) -> Iterator[Any]:
    """The caches in a list, those inside of a `CacheList` too."""
    for cache in caches:
        yield from leaves(cache.caches) if hasattr(cache, "caches") else (cache,)


def seen(cache: Any) -> Any:
    """The tokens that a layer's cache has seen, or None if it does not say.

    Those of mlx-lm call it offset; ours may count positions differently.
    """
    n = getattr(cache, "seen", None)
    return getattr(cache, "offset", None) if n is None else n


def total(bounds: Iterable[int | None]) -> int | None:
    """The sum, or None if one of them is not known."""
    known = list(bounds)
    return None if None in known else sum(b for b in known if b is not None)
