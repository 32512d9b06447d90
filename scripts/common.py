"""What the scripts share: where a figure comes from, and blocks of the README."""

import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"


def provenance() -> dict[str, Any]:
    """What it takes to repeat a run: command, versions, device, date."""
    import mlx.core as mx

    return {
        "command": " ".join(["python", *map(_argument, sys.argv)]),
        "versions": {p: version(p) for p in ("tova_mlx", "mlx", "mlx-lm")},
        "device": f"{mx.default_device()} {platform.machine()} {platform.system()}",
        "date": time.strftime("%Y-%m-%d"),
    }


def _argument(argument: str) -> str:
    """Of a path outside the repository its name."""
    path = Path(argument)
    return path.name if path.is_absolute() or ".." in path.parts else argument


def write_block(name: str, text: str) -> None:
    """Put text between the marks of that name in the README."""
    head, rest = README.read_text(encoding="utf-8").split(f"<!-- {name} -->")
    tail = rest.split(f"<!-- /{name} -->")[1]
    block = f"<!-- {name} -->\n{text}\n<!-- /{name} -->"
    README.write_text(head + block + tail, encoding="utf-8")
