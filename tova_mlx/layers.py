"""The caches of a model's layers, some of which hold several."""

from collections.abc import Iterable, Iterator
from typing import Any


def leaves(caches: Iterable[Any]) -> Iterator[Any]:
    """The caches in a list, those inside of a `CacheList` too."""
    for cache in caches:
        yield from leaves(cache.caches) if hasattr(cache, "caches") else (cache,)
