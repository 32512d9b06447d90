"""tova-mlx serve: mlx-lm's OpenAI-compatible server, every cache bounded."""

import os
import signal
import sys
import traceback
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from ..errors import ModelLoadError, TovaError
from .models import directory
from .options import cache_options, check, in_options, model_option
from .tools import replaced, run_tool


@click.command(
    short_help="An OpenAI-compatible server in bounded memory",
    context_settings={"ignore_unknown_options": True},
)
@model_option
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Port to listen at.",
)
@click.option(
    "--num-draft-tokens",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Tokens drafted at a time, with --draft-model.",
)
@cache_options
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve(
    arguments: tuple[str, ...], port: int, num_draft_tokens: int, **options: Any
) -> None:
    """An OpenAI-compatible server in bounded memory

    All other options go to mlx_lm.server: --host, --draft-model, --temp, --max-tokens,
    --prompt-cache-size, --log-level … ("mlx_lm.server --help" lists them). Ctrl-C
    stops it.

    Example: tova-mlx serve --max-kv-size 1024 --port 8080
    """
    check(options)
    path = directory(options["model"])
    from mlx_lm import server

    from ..caches.options import JOURNAL
    from ..hooks.server import Listener, PromptStore, Provider, request_handler

    _make_hub_cache()
    unlimited = options["policy"] == "full"
    most_drafts = None if unlimited else max(JOURNAL, num_draft_tokens)
    ours = {
        "LRUPromptCache": PromptStore,
        "ModelProvider": Provider,
        "_run_http_server": partial(
            server._run_http_server,
            server_class=Listener,
            handler_class=request_handler(most_drafts),
        ),
    }
    told = {"--model": path, "--port": port, "--num-draft-tokens": num_draft_tokens}
    given = [str(word) for pair in told.items() for word in pair]
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, _interrupt) for number in numbers}
    # Once mlx-lm's thread waits for requests, only `leave` ends the process.
    try:
        with replaced(server, **ours):
            run_tool(
                "server",
                [*given, *arguments],
                options,
                num_draft_tokens=num_draft_tokens,
            )
        leave(0)
    except (OSError, OverflowError, UnicodeError) as error:
        click.echo(f"Error: cannot listen: {error}. Try another --port.", err=True)
        leave(1)
    except TovaError as error:
        click.echo(in_options(error.line), err=True)
        leave(1)
    except KeyboardInterrupt:
        leave(130)
    except Exception:
        traceback.print_exc()
        leave(1)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _make_hub_cache() -> None:
    """Make the directory of fetched models: mlx-lm's list of models fails without it.

    Raises ModelLoadError.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelLoadError(
            f"HF_HUB_CACHE={HF_HUB_CACHE}: cannot be made ({error.strerror}). Set it "
            "to a directory of yours."
        ) from error


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
