"""A bounded cache in mlx-lm's own generate: one call, nothing else changes.

    python examples/custom_cache.py --model mlx-community/Llama-3.2-3B-Instruct-4bit \
        --text novel.txt

Reads a text of any length, answers a question about what it says last, and tells what
the cache holds beside what mlx-lm's would.
"""

import argparse
from pathlib import Path

from mlx_lm import load, stream_generate

from tova_mlx import describe, make_prompt_cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--question", default="What happens in this text?")
    parser.add_argument("--max-kv-size", type=int, default=1024)
    parser.add_argument("--policy", default="tova")
    parser.add_argument("--max-tokens", type=int, default=200)
    args = parser.parse_args()

    model, tokenizer = load(args.model)
    cache = make_prompt_cache(model, args.max_kv_size, policy=args.policy)
    text = args.text.read_text(encoding="utf-8")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{text}\n\n{args.question}"}],
        add_generation_prompt=True,
    )
    pieces = stream_generate(
        model, tokenizer, prompt, prompt_cache=cache, max_tokens=args.max_tokens
    )
    for piece in pieces:
        print(piece.text, end="", flush=True)

    totals = describe(cache).totals
    print(
        f"\n\n{totals['tokens_seen']} tokens seen, {totals['tokens_held']} held per "
        f"layer, {totals['bytes_now'] / 2**20:.1f} MiB"
    )


if __name__ == "__main__":
    main()
