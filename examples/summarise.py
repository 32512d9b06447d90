"""Summarises a file longer than the model's context, section by section.

    python examples/summarise.py novel.txt \
        --model mlx-community/Llama-3.2-3B-Instruct-4bit

One cache reads the whole file: it holds at most --max-kv-size tokens, so memory is
constant, and beyond the model's range tokens are numbered anew (positions="auto"). Each
section is summarised by a copy of the cache, which also holds what earlier sections
left in it; the summaries are summarised at the end.
"""

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import load, stream_generate
from mlx_lm.sample_utils import make_logits_processors

from tova_mlx import describe, make_prompt_cache

SECTION = "Summarise the section above in one or two sentences."
WHOLE = "These are summaries of a text's sections. Summarise the text in a paragraph."


def sections(tokens: list[int], length: int) -> Iterator[list[int]]:
    for start in range(0, len(tokens), length):
        yield tokens[start : start + length]


def turn(tokenizer: Any, question: str) -> tuple[list[int], list[int]]:
    """Return what a chat template puts before a text and after it, as tokens."""
    message = {"role": "user", "content": f"TEXT\n\n{question}"}
    whole = tokenizer.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=False
    )
    before, after = whole.split("TEXT")
    return (
        tokenizer.encode(before, add_special_tokens=False),
        tokenizer.encode(after, add_special_tokens=False),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--max-kv-size", type=int, default=2048)
    parser.add_argument("--policy", default="fade")
    parser.add_argument("--section", type=int, default=1500, help="tokens")
    parser.add_argument("--max-tokens", type=int, default=80, help="of a summary")
    args = parser.parse_args()

    model, tokenizer = load(args.model)
    cache = make_prompt_cache(
        model, args.max_kv_size, policy=args.policy, positions="auto"
    )
    # Small models repeat themselves.
    processors = make_logits_processors(repetition_penalty=1.1)

    def say(prompt: list[int], caches: list[Any]) -> str:
        answer = ""
        for piece in stream_generate(
            model,
            tokenizer,
            prompt,
            prompt_cache=caches,
            max_tokens=args.max_tokens,
            logits_processors=processors,
        ):
            print(piece.text, end="", flush=True)
            answer += piece.text
        print()
        return answer

    before, after = turn(tokenizer, SECTION)
    text = args.file.read_text(encoding="utf-8")
    tokens = tokenizer.encode(text, add_special_tokens=False)
    summaries = []
    for section in sections(tokens, args.section):
        model(mx.array([before + section]), cache=cache)
        mx.eval([c.state for c in cache])
        # The question and the answer are not part of the text: a copy reads them.
        summaries.append(say(after, copy.deepcopy(cache)))
        totals = describe(cache).totals
        print(
            f"  [{totals['tokens_seen']} tokens seen, {totals['tokens_held']} held, "
            f"{totals['bytes_now'] / 2**20:.1f} MiB]\n"
        )
    before, after = turn(tokenizer, WHOLE)
    whole = tokenizer.encode("\n".join(summaries), add_special_tokens=False)
    say(before + whole + after, make_prompt_cache(model, args.max_kv_size))


if __name__ == "__main__":
    main()
