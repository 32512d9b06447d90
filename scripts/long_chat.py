"""A conversation of hundreds of turns through the command line.

    python scripts/long_chat.py TEXT [--model PATH] [--turns 500] [--unpinned]
        [--out results/long_chat.json]

`tova-mlx chat` is given questions, sentences of the text, in 512 tokens: in one
process; in two, with /save, /exit and /load in the middle; and, if asked for, without
the system prompt pinned. The system prompt tells a name. After the first turn and the
last one it is asked for: what is answered, and the log-probability of the name. The
last line is JSON; exit 1 if the first two runs differ in a character, or the name was
less likely by more than 1 at the end than at the beginning while it was pinned.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
from common import finish, losses, provenance

from tova_mlx import convert
from tova_mlx.cli.models import load
from tova_mlx.models.conversation import Conversation
from tova_mlx.models.demo import demo_model_path

WORD, LIMIT, ANSWERED = "Marigold", 512, 8
SYSTEM = f"You are a helpful assistant. Your name is {WORD}."
QUESTION, BEGINS = "What is your name?", "I'm"


def questions(text: str, n: int) -> list[str]:
    """Sentences of a text, as somebody would put them to another."""
    flat = " ".join(text.split())
    sentences = [s for s in re.findall(r"[A-Z][^.!?]+[.!?]", flat) if 40 < len(s) < 120]
    return [f"What do you say to this? {s}" for s in sentences[-n:]]


def chat(lines: list[str], options: list[str]) -> str:
    """What a chat answers to lines of input."""
    command = [sys.executable, "-m", "tova_mlx", "chat", "--system-prompt", SYSTEM]
    done = subprocess.run(
        [*command, *options],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
    )
    if done.returncode or "Error" in done.stderr:
        sys.exit(f"{done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def asked(conversation: Conversation, path: Path) -> dict[str, Any]:
    """What a saved conversation answers, and how likely the word is in its answer."""
    conversation.load(path)
    seen = conversation.caches[0].seen
    tokens, caches = conversation._next_turn(QUESTION)
    encode = conversation.tokenizer.encode
    begins = encode(BEGINS, add_special_tokens=False)
    word = encode(f"{BEGINS} {WORD}", add_special_tokens=False)[len(begins) :]
    fed = [*tokens, *begins, *word]
    logits = conversation.model(mx.array([fed[:-1]]), cache=caches)[0, -len(word) :]
    log_probability = -float(losses(logits, mx.array(word)).sum())
    answer = "".join(piece.text for piece in conversation.ask(QUESTION))
    return {"tokens_seen": seen, "answer": answer, "log_probability": log_probability}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", type=Path, default=demo_model_path())
    parser.add_argument("--unpinned", action="store_true")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--turns", type=int, default=500)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines = questions(args.text.read_text(encoding="utf-8"), args.turns)
    if len(lines) < args.turns:
        sys.exit(f"{args.text}: {len(lines)} sentences are too few for {args.turns}.")
    place = Path(tempfile.mkdtemp())
    files = {n: str(place / f"{n}.safetensors") for n in ("first", "last", "half")}
    for n in ("first", "last") if args.unpinned else ():
        files[f"unpinned {n}"] = str(place / f"unpinned_{n}.safetensors")
    options = ["--max-kv-size", str(LIMIT), "--max-tokens", str(ANSWERED)]
    options += ["--model", str(args.model)]

    def whole(prefix: str = "", *others: str) -> str:
        first = [lines[0], f"/save {files[prefix + 'first']}"]
        rest = [*lines[1:], f"/save {files[prefix + 'last']}"]
        return chat([*first, *rest], [*options, *others])

    def halves() -> str:
        middle = args.turns // 2
        first = [*lines[:middle], f"/save {files['half']}", "/exit"]
        second = [f"/load {files['half']}", *lines[middle:]]
        return chat(first, options) + chat(second, options)

    with ThreadPoolExecutor(args.jobs) as pool:
        one, two = pool.submit(whole), pool.submit(halves)
        if args.unpinned:
            pool.submit(whole, "unpinned ", "--no-pin-system").result()
        same = one.result() == two.result()
    model, tokenizer, _ = load(str(args.model))
    convert(model, LIMIT, journal=0, positions="auto")
    conversation = Conversation(model, tokenizer, max_tokens=ANSWERED)
    found = {n: asked(conversation, Path(f)) for n, f in files.items() if n != "half"}
    change = found["last"]["log_probability"] - found["first"]["log_probability"]
    report = {
        "model": args.model.name,
        "turns": args.turns,
        "max_kv_size": LIMIT,
        "saved_and_loaded_is_the_same": same,
        "asked": found,
        **provenance(),
    }
    finish(report, args.out)
    sys.exit(not same or change < -1)


if __name__ == "__main__":
    main()
