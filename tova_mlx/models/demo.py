"""Where the demo models live: prepared by `scripts/prepare_demo_model.py`."""

import os
import sys
from pathlib import Path

# What `--model` calls them, and their directories. The GGUF file of the second says
# that it is the Coder variant, and its SHA-256 is that of Qwen's own file of it.
DEMO_MODELS = {
    "demo": "SmolLM2-135M-Instruct",
    "qwen2.5-0.5b": "Qwen2.5-Coder-0.5B-Instruct",
}


def demo_model_path(name: str = "demo") -> Path:
    """Return a demo model's directory in the user's cache directory, there or not.

    `name` is a key of `DEMO_MODELS`; raises KeyError for another.
    """
    home = Path.home()
    default = (
        home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache"
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or default)
    return cache / "tova_mlx" / DEMO_MODELS[name]
