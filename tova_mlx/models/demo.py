"""Where the demo models live: prepared by `scripts/prepare_demo_model.py`."""

import os
import sys
from pathlib import Path

from ..errors import ModelLoadError

# What `--model` calls them, and their directories. The GGUF file of the second says
# that it is the Coder variant, and its SHA-256 is that of Qwen's own file of it.
DEMO_MODELS = {
    "demo": "SmolLM2-135M-Instruct",
    "qwen2.5-0.5b": "Qwen2.5-Coder-0.5B-Instruct",
}


def demo_model_path(name: str = "demo") -> Path:
    """Return a demo model's directory in the user's cache directory, there or not.

    `name` is a key of `DEMO_MODELS`; raises KeyError for another, and ModelLoadError
    where nothing says which the user's cache directory is.
    """
    return _cache() / "tova_mlx" / DEMO_MODELS[name]


def _cache() -> Path:
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named)
    try:
        home = Path.home()
    except RuntimeError as error:
        raise ModelLoadError(
            "The demo models are in the user's cache directory, but this user has no "
            "home directory. Set HOME or XDG_CACHE_HOME, or give --model a directory."
        ) from error
    return home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache"
