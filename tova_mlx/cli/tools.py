"""Runs mlx-lm's own command-line tools, every model they load converted."""

import importlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click

from ..errors import (
    EvaluationError,
    OptionError,
    PromptError,
    TovaError,
    UnsupportedModelError,
    reason_of,
)
from .models import directory, load_with
from .options import cache_arguments, settle_size

TOOLS = ("cache_prompt", "chat", "evaluate", "generate")
# Those that have a parser to ask what they were told.
_PARSED = ("cache_prompt", "chat", "generate")


def run_tool(
    tool: str,
    arguments: Sequence[str],
    options: dict[str, Any],
    *,
    num_draft_tokens: int = 0,
    parts: int = 1,
    each: str = "conversations",
    budgeted: Callable[[int], Any] = lambda nbytes: None,
    pins: bool = False,
) -> None:
    """Run `mlx_lm.<tool>` with its own arguments and our cache options.

    num_draft_tokens: how many tokens will be drafted at most, where `arguments` do not
    say it; parts, each: how many sets of caches share a budget, and what each is;
    budgeted: is told the budget's bytes as soon as they are known; pins: whether
    conversations will pin their system prompts.
    """
    from ..hooks.blas import load_openblas

    load_openblas()
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from ..caches.options import JOURNAL
    from ..models.conversion import convert
    from ..models.rotary import said_of
    from .prompts import PromptFile, check_place

    if mx.distributed.init().size() > 1:
        raise UnsupportedModelError(
            f"mlx_lm.{tool} splits the heads of a layer among machines, so no policy "
            "sees all of them. Run it on one."
        )
    module = _module(tool)
    loader: Callable[..., Any] = module.load
    with replaced(sys, argv=[f"mlx_lm.{tool}", *arguments]), _explained(tool):
        parsed = tool in _PARSED
        given: Any = module.setup_arg_parser().parse_args() if parsed else None
        drafts = getattr(given, "draft_model", None) is not None
        if drafts:
            num_draft_tokens = given.num_draft_tokens
        if num_draft_tokens < 0:
            raise click.UsageError(f"--num-draft-tokens {num_draft_tokens} is below 0.")
        if tool == "cache_prompt":
            check_place(given.prompt_cache_file)
        # A server drops models that it loaded, and has no such files.
        prompt = PromptFile(options, given.model, num_draft_tokens) if parsed else None
        # Rejected drafts are taken back, whatever they evicted.
        journal = max(JOURNAL, num_draft_tokens)
        models = 1 + (drafts or any(a.startswith("--draft-model") for a in arguments))

        def load(name: str, *others: Any, **keywords: Any) -> Any:
            loaded = load_with(loader, directory(name), *others, **keywords)
            sized = dict(options)
            n, what = parts * models, each
            if models > 1:
                what = f"{each}, the draft model's counted" if parts > 1 else "models"
            nbytes = settle_size(loaded[0], sized, parts=n, each=what, journal=journal)
            if nbytes is not None:
                budgeted(nbytes)
            bound = partial(
                convert, loaded[0], journal=journal, **cache_arguments(sized)
            )
            report = prompt.fit(loaded[0], bound) if prompt else bound()
            said = _bound(report.totals, sized)
            bounded = sized["policy"] != "full"
            if bounded and sized["positions"] != "original":
                made = make_prompt_cache(loaded[0])
                said += f", positions {said_of(loaded[0], sized['positions'], made)}"
            if bounded and pins:
                half = sized["max_kv_size"] // 2
                said += f", system prompts of up to {half} tokens pinned"
            click.echo(f"{name}: {said}", err=True)
            return loaded

        functions: dict[str, Any] = {"load": load}
        if prompt:
            functions |= {
                "load_prompt_cache": prompt.load,
                "save_prompt_cache": prompt.save,
            }
        with replaced(module, **functions):
            module.main()


@contextmanager
def replaced(place: Any, **attributes: Any) -> Iterator[None]:
    """Give an object other attributes for a while; those that it lacks are left out."""
    before = {name: getattr(place, name) for name in attributes if hasattr(place, name)}
    for name in before:
        setattr(place, name, attributes[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(place, name, value)


@contextmanager
def _explained(tool: str) -> Iterator[None]:
    """Turn what a tool raises because of its user into one line.

    Raises EvaluationError, OptionError, PromptError; all else stays what it is.
    """
    from jinja2 import TemplateError

    try:
        yield
    except EOFError:
        # The end of the questions; only the letter q would do otherwise.
        if tool != "chat":
            raise
    except KeyError as error:
        if "not a registered task" not in str(error):
            raise
        raise EvaluationError(
            f"lm-eval: {error.args[0]}. `lm-eval ls tasks` names its tasks."
        ) from error
    except TemplateError as error:
        raise PromptError(
            f"mlx_lm.{tool}: the model's chat template does not take the conversation "
            f"({reason_of(error)}). Use another model."
        ) from error
    except (ValueError, FileNotFoundError) as error:
        if isinstance(error, TovaError) or not _is_users(error):
            raise
        is_json = isinstance(error, json.JSONDecodeError)
        reason = f"not JSON ({error})" if is_json else error
        raise OptionError(f"mlx_lm.{tool}: {reason}") from error


def _is_users(error: Exception) -> bool:
    """Whether mlx-lm raised it itself, or a value or file that it was given did."""
    import mlx_lm

    if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError, FileNotFoundError)):
        return True
    place = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return place.parent == Path(mlx_lm.__file__).parent


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
