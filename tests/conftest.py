"""Loads OpenBLAS before any test, and finds the demo model."""

import os
import shutil
from pathlib import Path

import pytest

from tova_mlx.hooks.blas import load_openblas

# Workers of pytest-xdist, and what they start, share the cores among them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
load_openblas()

from tova_mlx.models.demo import demo_model_path  # noqa: E402


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
def small_path(demo_path, tmp_path_factory) -> Path:
    """A random model of small weights and 32 KiB of keys and values a token."""
    import mlx.core as mx
    from mlx_lm.models import llama
    from mlx_lm.utils import save_config, save_model

    config = {
        "model_type": "llama",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "intermediate_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 512,
        "rms_norm_eps": 1e-5,
        "vocab_size": 49152,
    }
    mx.random.seed(0)
    path = tmp_path_factory.mktemp("small")
    save_model(path, llama.Model(llama.ModelArgs.from_dict(config)))
    save_config(config, config_path=path / "config.json")
    for file in demo_path.glob("*token*"):
        shutil.copy(file, path)
    return path


@pytest.fixture(scope="session")
def text() -> str:
    return (Path(__file__).parents[1] / "scripts" / "moby_dick_excerpt.txt").read_text(
        encoding="utf-8"
    )
