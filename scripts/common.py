"""What the scripts share: where a figure comes from, and tables in the documentation.

A script that imports this has MLX's matrix products on OpenBLAS, where there is one.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tova_mlx.hooks.blas import load_openblas

load_openblas()

ROOT = Path(__file__).parents[1]

# Which page has which generated table, between marks of its name.
EXCERPT = ROOT / "scripts" / "moby_dick_excerpt.txt"
PAGES = {
    "short": "README.md",
    "policies": "docs/policies.md",
    "models": "docs/models.md",
    "trust": "docs/trust.md",
    **dict.fromkeys(
        (
            *("quality", "bits", "bytes", "perplexity", "needle", "longrange", "kept"),
            *("recall", "recalled", "recalled-qwen", "recalled-later", "recalled-last"),
            "limits",
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


def repeated_ids(tokenizer: Any, file: Path, n: int) -> list[int]:
    """The first n tokens of a text, which begins again where it is too short."""
    from tova_mlx.evaluation.reading import first_ids

    ids = first_ids(tokenizer, file.read_text(encoding="utf-8"), n)
    return (ids * (n // len(ids) + 1))[:n]


def losses(logits: Any, wanted: Any) -> Any:
    """The loss of each token wanted [n], float32, by logits [n, vocabulary]."""
    import mlx.core as mx

    logits = logits.astype(mx.float32)
    chosen = mx.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
    return mx.logsumexp(logits, axis=-1) - chosen


def read_losses(model: Any, ids: list[int], caches: list[Any], step: int) -> Any:
    """The loss of each token of ids but the first, read in steps: float64."""
    import mlx.core as mx
    import numpy as np

    from tova_mlx.evaluation.reading import read

    inputs, wanted, found = mx.array([ids[:-1]]), mx.array(ids[1:]), []
    for start, logits in read(model, inputs, caches, step):
        own = wanted[start : start + logits.shape[1]]
        found.append(np.array(losses(logits[0], own)))
    return np.concatenate(found).astype(np.float64)


def resident(pid: int) -> int:
    """Bytes of a process that are in memory."""
    command = ["ps", "-o", "rss=", "-p", str(pid)]
    return 1024 * int(subprocess.run(command, capture_output=True, check=True).stdout)


def finish(report: dict[str, Any], out: Path | None, indent: int | None = None) -> None:
    """Write a report to a file if there is one, and print it: the last line is JSON.

    indent: of the file, which is one line without.
    """
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report, indent=indent)
        out.write_text(text + "\n", encoding="utf-8")
    print(json.dumps(report))


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
