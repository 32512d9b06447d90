"""Bounded key/value caches for mlx-lm: TOVA and its relatives.

Names are imported on first use, so that `tova-mlx --help` does not load MLX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .caches.layer import PolicyKVCache, TOVACache
    from .errors import TovaError
    from .models.conversion import convert, make_prompt_cache, revert
    from .models.report import Report, describe
    from .models.saved import load_prompt_cache, save_prompt_cache
    from .policies import POLICIES

__version__ = "0.1.0"

__all__ = [
    "POLICIES",
    "PolicyKVCache",
    "Report",
    "TOVACache",
    "TovaError",
    "convert",
    "describe",
    "load_prompt_cache",
    "make_prompt_cache",
    "revert",
    "save_prompt_cache",
]

_HOMES = {
    "POLICIES": "policies",
    "PolicyKVCache": "caches.layer",
    "Report": "models.report",
    "TOVACache": "caches.layer",
    "TovaError": "errors",
    "convert": "models.conversion",
    "describe": "models.report",
    "load_prompt_cache": "models.saved",
    "make_prompt_cache": "models.conversion",
    "revert": "models.conversion",
    "save_prompt_cache": "models.saved",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
