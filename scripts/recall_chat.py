"""A fact told in the first turn of a chat and asked for after much other talk.

    python scripts/recall_chat.py TEXT [--tokens 20000] [--model PATH] [--out FILE]

`tova-mlx chat` is told a number, then given passages of the text until it has seen so
many tokens, and asked for the number: with some of the slots for recall, without, and
with the full cache; or only with the settings named. FILE gets what was said in the
first and the last turns of each. The last line is JSON; exit 1 if the number is not
answered with recall.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import provenance

from tova_mlx.models.demo import demo_model_path

NUMBER = "48213"
TOLD = (
    f"Please remember this: the code of my bicycle lock is {NUMBER}. I will ask you "
    "for it later."
)
ASKED = "What is the code of my bicycle lock?"
GIVEN = "Here is a passage of a novel. Only say OK. "
# Words of a passage, and tokens of an answer.
PASSAGE, ANSWERED = 3000, 16


def passages(text: str) -> list[str]:
    """Passages of a text."""
    words = text.split()
    parts = [words[i : i + PASSAGE] for i in range(0, len(words) - PASSAGE, PASSAGE)]
    return [GIVEN + " ".join(part) for part in parts]


def chat(lines: list[str], options: list[str]) -> list[dict[str, str]]:
    """What a chat says to each line of input: `answer` and `notes`."""
    command = [sys.executable, "-u", "-m", "tova_mlx", "chat", *options]
    turns = []
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        start = running.stdout.readline()
        for line in lines:
            running.stdin.write(line + "\n")
            running.stdin.flush()
            said = []
            while not said or not re.search(r"tokens seen, .* bytes$", said[-1]):
                if not (got := running.stdout.readline()):
                    sys.exit(f"{start}{said}")
                said.append(got.rstrip("\n"))
            answer, notes = "\n".join(said[:-1]), said[-1].strip()
            turns.append({"asked": line, "answer": answer, "notes": notes})
            print(len(turns), notes, flush=True)
        rest, _ = running.communicate("/recalled\n")
        turns.append({"asked": "/recalled", "answer": rest.rstrip(), "notes": ""})
    return turns


def shown(turns: list[dict[str, str]]) -> str:
    """The first two turns and the last three, long lines cut."""
    parts: list[Any] = [*turns[:2], None, *turns[-3:]]
    lines = []
    for turn in parts:
        if turn is None:
            lines.append(f"\n… {len(turns) - 5} more passages …")
            continue
        lines += ["", f"> {turn['asked']}", turn["answer"], turn["notes"]]
    return "\n".join(
        part if len(part) <= 100 else part[:97] + "…"
        for line in lines
        for part in line.split("\n")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=20000)
    parser.add_argument("--model", type=Path, default=demo_model_path())
    parser.add_argument("--policy", default="tova")
    parser.add_argument("--max-kv-size", type=int, default=512)
    parser.add_argument("--recall", type=int, default=128, help="of --max-kv-size")
    parser.add_argument(
        "--setting", action="append", choices=["recall", "no recall", "full"]
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    # A word of a novel is a token and a third.
    turns = round(args.tokens / (PASSAGE * 1.35 + 20))
    lines = passages(args.text.read_text(encoding="utf-8"))[:turns]
    if len(lines) < turns:
        sys.exit(f"{args.text}: {len(lines)} passages are too few for {turns}.")
    options = ["--model", str(args.model), "--max-tokens", str(ANSWERED)]
    bounded = ["--policy", args.policy, "--max-kv-size", str(args.max_kv_size)]
    bounded += ["--positions", "original"]
    settings = {
        "recall": [*bounded, "--recall", str(args.recall)],
        "no recall": bounded,
        # What the model itself can answer when nothing is forgotten.
        "full": ["--policy", "full"],
    }
    report: dict[str, Any] = {"model": args.model.name, **provenance()}
    texts = []
    for name in args.setting or settings:
        others = settings[name]
        said = chat([TOLD, *lines, ASKED], [*options, *others])
        last = said[-2]
        report[name] = {
            "answer": last["answer"],
            "answered": NUMBER in last["answer"],
            "notes": last["notes"],
        }
        texts.append(f"$ tova-mlx chat {' '.join(others)}\n{shown(said)}\n")
        if args.out:
            args.out.write_text("\n\n".join(texts), encoding="utf-8")
    print(json.dumps(report))
    sys.exit(not report.get("recall", {"answered": True})["answered"])


if __name__ == "__main__":
    main()
