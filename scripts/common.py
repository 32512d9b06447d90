"""What the scripts share: where a figure comes from, and blocks of the README.

A script that imports this has MLX's matrix products on OpenBLAS, where there is one.
"""

import sys
from pathlib import Path
from typing import Any

from tova_mlx.hooks.blas import load_openblas

load_openblas()

README = Path(__file__).parents[1] / "README.md"


def provenance() -> dict[str, Any]:
    """What it takes to repeat a run: command, versions, device, date."""
    from tova_mlx.evaluation.results import circumstances

    return circumstances(f"python scripts/{Path(sys.argv[0]).name}")


def load_demo_model() -> tuple[Any, Any]:
    """The demo model and its tokenizer, in float32 where there is no Metal."""
    import mlx.core as mx
    from mlx_lm import load

    from tova_mlx.models.demo import demo_model_path

    model, tokenizer = load(str(demo_model_path()))
    if not mx.metal.is_available():
        model.set_dtype(mx.float32)
    return model, tokenizer


def write_block(name: str, text: str) -> None:
    """Put text between the marks of that name in the README."""
    head, rest = README.read_text(encoding="utf-8").split(f"<!-- {name} -->")
    tail = rest.split(f"<!-- /{name} -->")[1]
    block = f"<!-- {name} -->\n{text}\n<!-- /{name} -->"
    README.write_text(head + block + tail, encoding="utf-8")
