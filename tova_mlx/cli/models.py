"""Loads a model for a command, or says in one line why that does not work."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ModelLoadError, reason_of
from ..models.demo import DEMO_MODELS, demo_model_path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(model: str | None) -> str:
    """A directory or hub id for `--model`."""
    if model is None:
        demo = demo_model_path()
        if (demo / "config.json").is_file():
            return str(demo)
        from mlx_lm.chat import DEFAULT_MODEL

        return DEFAULT_MODEL
    if model in DEMO_MODELS and not Path(model).exists():
        prepared = demo_model_path(model)
        if (prepared / "config.json").is_file():
            return str(prepared)
        raise ModelLoadError(
            f"--model {model}: nothing at {prepared}. In a checkout of tova_mlx run "
            f"scripts/prepare_demo_model.py --model {model}; elsewhere name any model "
            "of mlx-lm, such as mlx-community/SmolLM2-135M-Instruct."
        )
    # os.path takes no name for an error, be it too long or ~ of somebody unknown.
    path = os.path.expanduser(model)
    if os.path.isdir(path):
        return path
    if os.path.exists(path) or not _HUB_ID.fullmatch(model):
        raise ModelLoadError(
            f"--model {model}: no such directory, and no hub id (owner/name). Check "
            "the path, or use demo."
        )
    return model


def load(model: str | None) -> tuple[Any, Any, str]:
    """Model, tokenizer and the directory they were loaded from.

    Raises ModelLoadError.
    """
    from ..hooks.blas import load_openblas

    load_openblas()
    from mlx_lm import load as mlx_lm_load

    path = directory(model)
    loaded = load_with(mlx_lm_load, path)
    return loaded[0], loaded[1], path


def load_with(
    loader: Callable[..., Any], path: str, *arguments: Any, **options: Any
) -> Any:
    """What mlx-lm's `loader` gives for a directory; its first item is the model.

    Raises ModelLoadError. Where there is no Metal the model runs in float32: half
    precision is slower there.
    """
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from ..models.model_files import check_files
    from ..models.report import trace
    from ..models.vocabulary import check_tokenizer

    try:
        check_files(path)
        loaded = loader(path, *arguments, **options)
        if not mx.metal.is_available():
            loaded[0].set_dtype(mx.float32)
        # Now, and in this thread: the server generates in another.
        mx.eval(loaded[0].parameters())
        # What files say wrongly may come out with the first token only.
        trace(loaded[0], make_prompt_cache(loaded[0]))
        loaded[1].decode(loaded[1].encode("a"))
        check_tokenizer(loaded[0], loaded[1])
    except Exception as error:
        # Anything may come out of a damaged file; the reason is all a user can use.
        raise ModelLoadError(
            f"--model: cannot load {path} ({reason_of(error)}). A file may be "
            "missing or cut off: get or convert the model again."
        ) from error
    return loaded


def directory(model: str | None) -> str:
    """Where the files of a `--model` are, fetched if need be. Raises ModelLoadError."""
    name = resolve(model)
    if Path(name).is_dir():
        return name
    from mlx_lm.utils import _download

    try:
        return str(_download(name))
    except Exception as error:
        raise ModelLoadError(
            f"--model {name}: cannot get it from the hub ({reason_of(error)}). "
            "Check the name and the network, or give a local directory."
        ) from error
