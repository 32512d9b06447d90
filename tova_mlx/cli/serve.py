"""tova-mlx serve: mlx-lm's OpenAI-compatible server, every cache bounded."""

import argparse
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
from .address import check_address
from .models import directory
from .options import cache_options, check, in_options, model_option, pin_option
from .tools import replaced, run_tool


@click.command(
    short_help="An OpenAI-compatible server in bounded memory",
    context_settings={"ignore_unknown_options": True},
)
@model_option
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen at; the default is for this machine alone.",
)
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
@partial(cache_options, positions="auto")
@pin_option
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve(
    arguments: tuple[str, ...],
    host: str,
    port: int,
    num_draft_tokens: int,
    pin_system: bool,
    **options: Any,
) -> None:
    """An OpenAI-compatible server in bounded memory

    All other options go to mlx_lm.server: --draft-model, --temp, --max-tokens,
    --prompt-cache-size, --log-level … ("mlx_lm.server --help" lists them). Ctrl-C
    stops it.

    Example: tova-mlx serve --max-kv-size 1024 --port 8080
    """
    check(options)
    if options["archive"]:
        raise click.UsageError(
            "--archive is of one conversation, and those of a server share what they "
            "begin with. Leave it out: what is evicted is kept in memory."
        )
    check_address(host, port)
    path = directory(options["model"])
    from mlx_lm import server

    from ..caches.options import JOURNAL
    from ..hooks.generation import generator
    from ..hooks.handler import Listener, request_handler
    from ..hooks.server import PromptStore, Provider
    from ..models.conversion import pin_in_new_caches
    from ..models.rows import takes_rows

    _make_hub_cache()
    unlimited = options["policy"] == "full"
    most_drafts = None if unlimited else max(JOURNAL, num_draft_tokens)
    shared = _Shared(arguments, options["max_kv_size"])
    ours = {
        "LRUPromptCache": lambda n: PromptStore(n, max_bytes=shared.stored_bytes),
        "ModelProvider": partial(Provider, find=directory, takes_rows=takes_rows),
        "ResponseGenerator": generator(
            give_up, pin_in_new_caches if pin_system else None
        ),
        "_run_http_server": partial(
            server._run_http_server,
            server_class=Listener,
            handler_class=request_handler(most_drafts),
        ),
    }
    told = {"--model": path, "--host": host, "--port": port}
    told |= {"--num-draft-tokens": num_draft_tokens, **shared.told}
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
                parts=_SHARES * shared.rows,
                each=f"parts ({shared.rows} conversations at once, as much for stored "
                "ones and for copies)",
                budgeted=shared.budgeted,
                pins=pin_system,
            )
        leave(0)
    except OSError as error:
        # Somebody took the port while the model was loaded.
        click.echo(f"Error: cannot listen: {error}. Try another --port.", err=True)
        leave(1)
    except click.UsageError as error:
        error.show()
        leave(error.exit_code)
    except TovaError as error:
        click.echo(in_options(error.line), err=True)
        leave(1)
    except KeyboardInterrupt:
        click.echo("Interrupted.", err=True)
        leave(130)
    except Exception:
        traceback.print_exc()
        leave(1)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# Of a budget: the conversations that are read or answered, those that are stored, and
# copies while one joins a batch, leaves it or is stored.
_SHARES = 3


class _Shared:
    """How conversations share a budget; mlx-lm's own numbers where there is none.

    rows: conversations that may be read or answered at once; told: options for
    mlx-lm that make it so, unless the user gave them.
    """

    stored_bytes = 1 << 63

    def __init__(self, arguments: tuple[str, ...], size: Any):
        self.told: dict[str, int] = {}
        self.rows = 1
        if isinstance(size, int):
            return
        parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
        parser.add_argument("--decode-concurrency", type=int, default=4)
        parser.add_argument("--prompt-concurrency", type=int, default=1)
        try:
            known, _ = parser.parse_known_args(arguments)
        except argparse.ArgumentError:
            # mlx-lm says it, in its own words.
            return
        self.told = {f"--{k.replace('_', '-')}": v for k, v in vars(known).items()}
        # As mlx-lm counts: prompts join those that are answered.
        decoded = max(known.decode_concurrency, known.prompt_concurrency)
        self.rows = max(1, decoded + known.prompt_concurrency)

    def budgeted(self, nbytes: int) -> None:
        self.stored_bytes = nbytes // _SHARES


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


def give_up(reason: str) -> NoReturn:
    """End the process: nothing can be generated any more."""
    click.echo(f"Error: no answer can be generated ({reason}). Start again.", err=True)
    leave(1)


def leave(code: int) -> NoReturn:
    """End the process now.

    mlx-lm's thread may still wait for requests, and while Python winds down MLX's own
    threads may abort the process, as they do mlx-lm's server.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
