"""Loads OpenBLAS before any test, and finds the demo model."""

import os
from pathlib import Path

import pytest

from tova_mlx.blas import load_openblas

load_openblas()

from tova_mlx.demo import demo_model_path  # noqa: E402


@pytest.fixture(scope="session")
def demo_path() -> Path:
    path = demo_model_path()
    if not (path / "config.json").is_file():
        reason = f"no demo model at {path}: run scripts/prepare_demo_model.py"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture(scope="session")
def demo(demo_path):
    import mlx.core as mx
    from mlx_lm import load

    model, tokenizer = load(str(demo_path))
    model.set_dtype(mx.float32)
    return model, tokenizer


@pytest.fixture(scope="session")
def text() -> str:
    return (Path(__file__).parents[1] / "scripts" / "moby_dick_excerpt.txt").read_text(
        encoding="utf-8"
    )
