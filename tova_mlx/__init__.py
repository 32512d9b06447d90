"""Bounded key/value caches for mlx-lm: TOVA and its relatives.

Names are imported on first use, so that `tova-mlx --help` does not load MLX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .caches.observing import observe_evictions
    from .caches.options import ArchiveOptions
    from .caches.tova import PolicyKVCache, TOVACache
    from .errors import (
        CacheStateError,
        EvaluationError,
        ModelLoadError,
        OptionError,
        PromptError,
        RequestError,
        TovaError,
        UnsupportedModelError,
    )
    from .inspection.record import Inspection
    from .inspection.recording import inspect
    from .models.conversation import Conversation, Recalled
    from .models.conversion import convert, make_prompt_cache, revert
    from .models.report import Report, describe
    from .models.saved import load_prompt_cache, save_prompt_cache
    from .policies import POLICIES, Policy, register_policy

__version__ = "0.2.0"

_HOMES = {
    "caches.tova": ("PolicyKVCache", "TOVACache"),
    "caches.observing": ("observe_evictions",),
    "caches.options": ("ArchiveOptions",),
    "errors": (
        "CacheStateError",
        "EvaluationError",
        "ModelLoadError",
        "OptionError",
        "PromptError",
        "RequestError",
        "TovaError",
        "UnsupportedModelError",
    ),
    "inspection.record": ("Inspection",),
    "inspection.recording": ("inspect",),
    "models.conversation": ("Conversation", "Recalled"),
    "models.conversion": ("convert", "make_prompt_cache", "revert"),
    "models.report": ("Report", "describe"),
    "models.saved": ("load_prompt_cache", "save_prompt_cache"),
    "policies": ("POLICIES", "Policy", "register_policy"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "POLICIES",
    "ArchiveOptions",
    "CacheStateError",
    "Conversation",
    "EvaluationError",
    "Inspection",
    "ModelLoadError",
    "OptionError",
    "Policy",
    "PolicyKVCache",
    "PromptError",
    "Recalled",
    "Report",
    "RequestError",
    "TOVACache",
    "TovaError",
    "UnsupportedModelError",
    "convert",
    "describe",
    "inspect",
    "load_prompt_cache",
    "make_prompt_cache",
    "observe_evictions",
    "register_policy",
    "revert",
    "save_prompt_cache",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
