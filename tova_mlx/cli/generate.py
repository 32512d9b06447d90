"""tova-mlx generate: continues a prompt in bounded memory, streamed."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from ..errors import PromptError
from ..progress import Bar
from .options import (
    cache_arguments,
    cache_options,
    check,
    model_option,
    sampling_options,
    settle_size,
)
from .parameters import TEXT_FILE
from .saving import mebibytes, saving
from .texts import read_given


@click.command(short_help="Text continued in bounded memory")
@click.argument("prompt", required=False)
@click.option("--prompt-file", type=TEXT_FILE, help="Read the prompt from here.")
@click.option("--no-chat-template", is_flag=True, help="Continue the text as it is.")
@model_option
@cache_options
@sampling_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def generate(
    prompt: str | None, prompt_file: Path | None, as_json: bool, **options: Any
) -> None:
    """Text continued in bounded memory; PROMPT, --prompt-file, or '-' for stdin

    Example: tova-mlx generate "Why is the sky blue?" --max-kv-size 256
    """
    text = _read(prompt, prompt_file)
    check(options)
    from .models import load

    model, tokenizer, path = load(options["model"])
    import mlx.core as mx
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_sampler

    from ..models.conversion import make_prompt_cache
    from ..models.report import describe
    from ..models.vocabulary import check_tokens

    tokens = _encode(tokenizer, text, options["no_chat_template"])
    check_tokens(model, tokens)
    settle_size(model, options, journal=0)
    caches = make_prompt_cache(
        model,
        journal=0,
        **cache_arguments(options),
    )
    if options["policy"] == "full":
        click.echo("full keeps everything: --max-kv-size is not read.", err=True)
    mx.random.seed(options["seed"])
    mx.reset_peak_memory()
    pieces: list[str] = []
    last = None
    interrupted = False
    try:
        with Bar(delay=0.5) as bar:
            for last in stream_generate(
                model,
                tokenizer,
                tokens,
                max_tokens=options["max_tokens"],
                sampler=make_sampler(options["temp"], options["top_p"]),
                prompt_cache=caches,
                prefill_step_size=options["prefill_step_size"],
                prompt_progress_callback=bar.reached,
            ):
                pieces.append(last.text)
                if not as_json:
                    click.echo(last.text, nl=False)
    except KeyboardInterrupt:
        if last is None:
            raise
        interrupted = True
    if not as_json:
        click.echo()
    report = describe(caches)
    totals = report.totals
    result = {
        "text": "".join(pieces),
        "model": options["model"] or path,
        "policy": options["policy"],
        "max_kv_size": None if options["policy"] == "full" else options["max_kv_size"],
        "prompt_tokens": len(tokens),
        "generation_tokens": last.generation_tokens if last else 0,
        "prompt_tps": last.prompt_tps if last else None,
        "generation_tps": last.generation_tps if last else None,
        "peak_memory_bytes": mx.get_peak_memory(),
        "cache_bytes": totals["bytes_now"],
        "tokens_seen": totals["tokens_seen"],
        "tokens_held": totals["tokens_held"],
        "layers": report.to_dict()["layers"],
    }
    if as_json:
        click.echo(json.dumps(result))
    else:
        _print_statistics(result)
        click.echo(saving(model, caches), err=True)
    if interrupted:
        sys.exit(130)


def _read(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("Give PROMPT or --prompt-file, one of them.")
    return read_given(prompt, prompt_file, "PROMPT", "prompt")


def _encode(tokenizer: Any, text: str, raw: bool) -> list[int]:
    from ..hooks.template import rendered

    if raw or tokenizer.chat_template is None:
        tokens = list(tokenizer.encode(text))
    else:
        messages = [{"role": "user", "content": text}]
        tokens = list(rendered(tokenizer, messages))
    if not tokens:
        raise PromptError("The prompt has no tokens. Give at least one word.")
    return tokens


def _print_statistics(result: dict[str, Any]) -> None:
    def speed(tps: float | None) -> str:
        return "–" if tps is None else f"{tps:.1f} tokens/s"

    lines = [
        f"prompt: {result['prompt_tokens']} tokens, {speed(result['prompt_tps'])}",
        f"generated: {result['generation_tokens']} tokens, "
        f"{speed(result['generation_tps'])}",
        f"tokens seen: {result['tokens_seen']}, "
        f"held: {result['tokens_held']} per layer",
        f"cache: {mebibytes(result['cache_bytes'])}, peak memory: "
        f"{mebibytes(result['peak_memory_bytes'])}",
    ]
    click.echo("\n".join(lines), err=True)
