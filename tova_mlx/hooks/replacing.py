"""Functions of mlx-lm that are replaced, once per process, and put back.

mlx-lm's modules import functions by name, so each module that holds one gets the
replacement. A replacement knows what it stands for: reloading a module, ours or
mlx-lm's, neither wraps twice nor loses the original.
"""

import sys
from collections.abc import Callable, Iterator
from threading import RLock
from types import ModuleType
from typing import Any, TypeVar

_MARK = "__tova_mlx_replaces__"
_lock = RLock()
F = TypeVar("F", bound=Callable[..., Any])


def original(function: Any) -> Any:
    """Return what mlx-lm has in the place of a function; itself if not replaced."""
    return getattr(function, _MARK, function)


def is_same(function: Any, theirs: Any) -> bool:
    """Whether a function is this one of mlx-lm's (of before a reload too) or ours."""

    def whence(f: Any) -> tuple[Any, Any]:
        return getattr(f, "__module__", None), getattr(f, "__qualname__", None)

    there = original(function)
    return there is theirs or whence(there) == whence(theirs)


def stands_for(home: ModuleType, name: str) -> Callable[[F], F]:
    """Decorate a function that is to replace one of mlx-lm's, defined in `home`."""

    def mark(new: F) -> F:
        setattr(new, _MARK, original(getattr(home, name)))
        return new

    return mark


def replace(
    home: ModuleType, name: str, new: Callable[..., Any], only_in: str | None = None
) -> None:
    """Put `new` in the place of mlx-lm's function in every module that imported it.

    home: the module that defines it; only_in: the one module to change, by its name.
    """
    with _lock:
        theirs = original(getattr(home, name))
        setattr(new, _MARK, theirs)
        for module in _holding(name, theirs):
            if only_in in (None, module.__name__):
                setattr(module, name, new)


def put_back(home: ModuleType, name: str) -> None:
    """Put mlx-lm's own function back everywhere."""
    with _lock:
        theirs = original(getattr(home, name))
        for module in _holding(name, theirs):
            setattr(module, name, theirs)


def _holding(name: str, theirs: Any) -> Iterator[ModuleType]:
    """Modules that have a function of mlx-lm, or ours for it, under its name."""
    package = __name__.partition(".")[0]
    for module in list(sys.modules.values()):
        there = getattr(module, "__dict__", {}).get(name)
        if there is None or not is_same(there, theirs):
            continue
        if module.__name__.partition(".")[0] != package:
            yield module
