"""Archives on disk for the caches of a model."""

import itertools
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

from ..caches.layer import PolicyKVCache
from ..caches.options import ArchiveOptions
from ..hooks.layers import leaves
from ..storage.disk_archive import Disk
from ..storage.log_directory import LogDirectory

# Those of this process, as long as their caches live.
_open: WeakSet[LogDirectory] = WeakSet()


def archive_on_disk(caches: Iterable[Any], options: ArchiveOptions) -> None:
    """Let caches keep what they evict, and have evicted, in a directory of their own.

    It is one below the options' and is deleted when the caches are.

    Raises OptionError: the directory cannot be used.
    """
    ours = [
        cache
        for cache in leaves(caches)
        if isinstance(cache, PolicyKVCache) and cache.slots.recall is not None
    ]
    if not ours:
        return
    # A ~ of nobody known stays, and is refused below.
    directory = _own_directory(Path(os.path.expanduser(options.path)))
    limit = None if options.limit is None else options.limit // len(ours)
    for layer, cache in enumerate(ours):
        name = f"layer-{layer:03}"
        cache.archive_on(Disk(directory, name, limit=limit, forgets=options.forgets))


def _own_directory(path: Path) -> LogDirectory:
    """A directory below `path` that no other caches have."""
    mine = {d.path for d in _open if d.path.parent == path}
    if not mine:
        # What a run that was killed left there. Refused if one has not ended.
        for stale in sorted(path.glob("caches-[0-9]*")):
            LogDirectory(stale).close()
            with suppress(OSError):
                stale.rmdir()
    places = (path / f"caches-{i:03}" for i in itertools.count())
    directory = LogDirectory(next(place for place in places if place not in mine))
    _open.add(directory)
    return directory
