"""Where the demo model lives: prepared by `scripts/prepare_demo_model.py`."""

import os
import sys
from pathlib import Path


def demo_model_path() -> Path:
    """The demo model's directory in the user's cache directory, there or not."""
    home = Path.home()
    default = (
        home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache"
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or default)
    return cache / "tova_mlx" / "SmolLM2-135M-Instruct"
