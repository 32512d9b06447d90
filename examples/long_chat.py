"""A long chat that finds again what was said first: a bounded cache with recall.

    python examples/long_chat.py novel.txt \
        --model mlx-community/Llama-3.2-3B-Instruct-4bit

Tells the model a number, lets it read passages of the file until it has long been
evicted, and asks for the number: with recall, and without.
"""

import argparse
from pathlib import Path
from typing import Any

from mlx_lm import load

from tova_mlx import Conversation, convert, describe

TOLD = "Remember this: the code of my bicycle lock is 48213. I will ask for it later."
ASKED = "What is the code of my bicycle lock?"
PASSAGE = "Here is a passage of a novel. Only say OK.\n\n"


def say(conversation: Conversation, text: str) -> str:
    return "".join(piece.text for piece in conversation.ask(text)).strip()


def chat(model: Any, tokenizer: Any, passages: list[str]) -> None:
    conversation = Conversation(model, tokenizer, max_tokens=12)
    print(f"> {TOLD}\n{say(conversation, TOLD)}")
    for passage in passages:
        say(conversation, PASSAGE + passage)
    print(f"… {len(passages)} passages …\n> {ASKED}\n{say(conversation, ASKED)}")
    totals: dict[str, Any] = describe(conversation.caches).totals
    print(
        f"  [{totals['tokens_seen']} tokens seen, {totals['tokens_held']} held, "
        f"{totals['archived']} in the archive]"
    )
    found = sorted(conversation.recalled(), key=lambda r: -r.layers)
    for r in found[:3]:
        print(f"  {r.layers} layers read again: {' '.join(r.text.split())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--max-kv-size", type=int, default=512)
    parser.add_argument("--recall", type=int, default=128)
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--words", type=int, default=500, help="of a passage")
    args = parser.parse_args()

    words = args.file.read_text(encoding="utf-8").split()
    starts = range(0, args.passages * args.words, args.words)
    passages = [" ".join(words[i : i + args.words]) for i in starts]
    model, tokenizer = load(args.model)
    for recall in (args.recall, 0):
        print(f"\nrecall={recall}")
        convert(model, args.max_kv_size, recall=recall)
        chat(model, tokenizer, passages)


if __name__ == "__main__":
    main()
