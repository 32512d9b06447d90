"""tova-mlx serve: mlx-lm's OpenAI-compatible server, every cache bounded."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from .models import directory
from .options import cache_options, check, model_option
from .tools import run_tool


@click.command(
    short_help="An OpenAI-compatible server in bounded memory",
    context_settings={"ignore_unknown_options": True},
)
@model_option
@cache_options
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve(arguments: tuple[str, ...], **options: Any) -> None:
    """An OpenAI-compatible server in bounded memory

    All other options go to mlx_lm.server: --host, --port, --draft-model, --temp,
    --max-tokens, --prompt-cache-size, --log-level … ("mlx_lm.server --help" lists
    them). Ctrl-C stops it.

    Example: tova-mlx serve --max-kv-size 1024 --port 8080
    """
    check(options)
    path = directory(options["model"])
    from huggingface_hub.constants import HF_HUB_CACHE
    from mlx_lm import server

    class Provider(server.ModelProvider):
        """Loads its model before it listens: an error then ends the command."""

        def __init__(self, arguments: Any):
            super().__init__(arguments)
            self.load_default()

    provider, server.ModelProvider = server.ModelProvider, Provider
    # Its list of models fails where nothing was ever fetched from the hub.
    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, _interrupt) for number in numbers}
    try:
        run_tool("server", ["--model", path, *arguments], options)
        leave(0)
    except OSError as error:
        click.echo(f"Error: cannot listen: {error}. Try another --port.", err=True)
        leave(1)
    except KeyboardInterrupt:
        leave(130)
    finally:
        server.ModelProvider = provider
        for number, handler in handlers.items():
            signal.signal(number, handler)


def leave(code: int) -> None:
    """End the process now.

    mlx-lm's thread may still wait for requests, and while Python winds down MLX's own
    threads may abort the process, as they do mlx-lm's server.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
