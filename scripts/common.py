"""What the scripts share: where a figure comes from, and tables in the documentation.

A script that imports this has MLX's matrix products on OpenBLAS, where there is one.
"""

import sys
from pathlib import Path
from typing import Any

from tova_mlx.hooks.blas import load_openblas

load_openblas()

ROOT = Path(__file__).parents[1]

# Which page has which generated table, between marks of its name.
PAGES = {
    "short": "README.md",
    "policies": "docs/policies.md",
    "models": "docs/models.md",
    **dict.fromkeys(
        (
            *("quality", "bits", "bytes", "perplexity", "needle", "longrange", "kept"),
            *("recall", "recalled"),
        ),
        "docs/results.md",
    ),
}


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


def losses(logits: Any, wanted: Any) -> Any:
    """The loss of each token wanted [n], float32, by logits [n, vocabulary]."""
    import mlx.core as mx

    logits = logits.astype(mx.float32)
    chosen = mx.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
    return mx.logsumexp(logits, axis=-1) - chosen


def block(name: str) -> str:
    """Return the table of that name as its page has it."""
    text = (ROOT / PAGES[name]).read_text(encoding="utf-8")
    return text.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0].strip()


def write_block(name: str, text: str) -> None:
    """Put a table between the marks of its name, in the page that has them."""
    page = ROOT / PAGES[name]
    head, rest = page.read_text(encoding="utf-8").split(f"<!-- {name} -->")
    tail = rest.split(f"<!-- /{name} -->")[1]
    marked = f"<!-- {name} -->\n{text}\n<!-- /{name} -->"
    page.write_text(head + marked + tail, encoding="utf-8")
