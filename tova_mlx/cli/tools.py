"""Runs mlx-lm's own command-line tools, every model they load converted."""

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from ..errors import EvaluationError, UnsupportedModelError
from .models import directory, load_with
from .options import cache_arguments

TOOLS = ("cache_prompt", "chat", "evaluate", "generate")


def run_tool(tool: str, arguments: Sequence[str], options: dict[str, Any]) -> None:
    """Run `mlx_lm.<tool>` with its own arguments and our cache options."""
    from ..blas import load_openblas

    load_openblas()
    import mlx.core as mx

    from ..conversion import convert

    if mx.distributed.init().size() > 1:
        raise UnsupportedModelError(
            f"mlx_lm.{tool} splits the heads of a layer among machines, so no policy "
            "sees all of them. Run it on one."
        )
    module = _module(tool)
    loader: Callable[..., Any] = module.load

    def load(name: str, *arguments: Any, **keywords: Any) -> Any:
        loaded = load_with(loader, directory(name), *arguments, **keywords)
        report = convert(loaded[0], **cache_arguments(options))
        click.echo(f"{name}: {_bound(report.totals, options)}", err=True)
        return loaded

    before = sys.argv
    module.load = load
    sys.argv = [f"mlx_lm.{tool}", *arguments]
    try:
        module.main()
    except KeyError as error:
        if "not a registered task" not in str(error):
            raise
        raise EvaluationError(
            f"lm-eval: {error.args[0]}. `lm-eval ls tasks` names its tasks."
        ) from error
    finally:
        module.load, sys.argv = loader, before


def _module(tool: str) -> Any:
    try:
        return importlib.import_module(f"mlx_lm.{tool}")
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise EvaluationError(
            'mlx_lm.evaluate needs lm-eval. Run: pip install "tova_mlx[eval]"'
        ) from error


def _bound(totals: dict[str, Any], options: dict[str, Any]) -> str:
    most = totals["bytes_at_most"]
    if most is None:
        return f"{options['policy']}, caches without limit"
    return (
        f"{options['policy']} keeps {options['max_kv_size']} tokens per layer, "
        f"caches of at most {most:,} bytes"
    )
