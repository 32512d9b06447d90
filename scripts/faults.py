"""Every command disturbed: killed, on a full disk, by Ctrl-C, in odd surroundings.

    python scripts/faults.py [--only kill] [--jobs 2] [--out results/trust/faults.json]

Runs the commands themselves, each in a fresh process, with a tiny random model. Those
that write files are disturbed at their n-th step of work on files (`tests/faulty`) by
kill -9, a disk that is full from then on, or Ctrl-C, and then started again: nothing
that was there may be lost, nothing half written taken for whole, and the next start
has to leave just what an undisturbed one leaves. Real full and read-only file systems
and users without a home need root on Linux, and are left out, with a word, elsewhere.
Streams that are closed or full, locales of ASCII, missing directories and signals: a
clear end with the right exit code, never a traceback.

Prints a line for each fault and command as it goes on, and a JSON object as the last
line. Exit code 1 if anything failed.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from common import provenance

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import fault_ends as ends
from fault_serve import SERVING, TERMINAL
from fault_writers import WRITERS, Undisturbed, chosen_steps, disturb
from faults import Place

from tova_mlx.tables import table

# Of a command's time, when Ctrl-C comes.
MOMENTS = (0.2, 0.4, 0.6, 0.8)
# Pages that a real disk has left.
PAGES = (1, 3, 12)

# What is tried: a fault, a command, and what each try finds wrong.
Try = tuple[str, str, Callable[[], list[str]]]


def steps_disturbed(place: Place, kind: str, most: int) -> Iterator[Try]:
    """Disturb every writer at its steps."""
    said = {"kill": "kill -9", "full": "disk full", "interrupt": "Ctrl-C"}[kind]
    for writer in WRITERS:
        calm = Undisturbed.of(place, writer)
        for at in chosen_steps(calm.steps, most):
            yield (
                f"{said} while writing",
                writer.name,
                lambda w=writer, c=calm, n=at: [
                    f"step {n} ({c.steps[n].split('/wörk/')[-1]}): {problem}"
                    for problem in disturb(place, w, c, kind, n)
                ],
            )


def disks(place: Place) -> Iterator[Try]:
    """Real file systems that are full or read-only, and another user."""
    for writer in WRITERS:
        calm = Undisturbed.of(place, writer)
        for pages in PAGES:
            yield (
                "real full disk",
                writer.name,
                lambda w=writer, c=calm, n=pages: ends.fill_disk(place, w.name, c, n),
            )
        how = (place, writer.name, calm)
        yield "read-only disk", writer.name, lambda how=how: ends.read_only(*how)
        yield "directory of others", writer.name, lambda how=how: ends.by_nobody(*how)


def endings(place: Place) -> Iterator[Try]:
    """Streams and surroundings."""
    for ending in ends.ENDINGS:
        if ending.needs_root and not ends.can_mount():
            continue
        for command in ending.commands:
            yield (
                ending.name,
                command,
                lambda e=ending, c=command: ends.end(place, e, c),
            )


def signals(place: Place) -> Iterator[Try]:
    """Ctrl-C at some moments of each command; a server and a terminal."""
    for name, words in ends.COMMANDS.items():
        if name == "--help":
            continue
        place.clear()
        begun = time.perf_counter()
        place.run(words, ends.SAID)
        seconds = time.perf_counter() - begun
        for moment in MOMENTS:

            def press(words: str = words, at: float = moment * seconds) -> list[str]:
                place.clear()
                done = ends.send(place, words, ends.SIGINT, ends.after(at))
                return ends.wrong_after_interrupt(done)

            yield "Ctrl-C at some moment", name, press
    for fault, attempt in {**SERVING, **TERMINAL}.items():
        name = "serve" if fault in SERVING else "chat in a terminal"
        yield fault, name, lambda attempt=attempt: attempt(place)


def run_part(part: str, steps: int) -> list[tuple[str, str, list[str]]]:
    """Make all tries of a part, in a place of its own: fault, command, problems."""
    found = []
    with tempfile.TemporaryDirectory(prefix="tova_mlx-faults-") as root:
        # Others shall get in, for a user who is not this one.
        Path(root).chmod(0o755)
        for fault, command, attempt in PARTS[part](Place(Path(root)), steps):
            problems = [problem.replace(root, "…") for problem in attempt()]
            found.append((fault, command, problems))
            said = "; ".join(problems) or "survived"
            print(f"{fault}, {command}: {said}", file=sys.stderr, flush=True)
    return found


PARTS: dict[str, Callable[[Place, int], Iterator[Try]]] = {
    "kill": lambda place, n: steps_disturbed(place, "kill", n),
    "full": lambda place, n: steps_disturbed(place, "full", n // 2),
    "interrupt": lambda place, n: steps_disturbed(place, "interrupt", n // 2),
    "disks": lambda place, n: disks(place),
    "ends": lambda place, n: endings(place),
    "signals": lambda place, n: signals(place),
}


def rows_of(part: str, tried: list[tuple[str, str, list[str]]]) -> list[dict[str, Any]]:
    """A row for each fault and command of a part."""
    found: dict[tuple[str, str], list[list[str]]] = {}
    for fault, command, problems in tried:
        found.setdefault((fault, command), []).append(problems)
    return [
        {
            "part": part,
            "fault": fault,
            "command": command,
            "tries": len(tries),
            "survived": sum(not problems for problems in tries),
            "failures": [problem for problems in tries for problem in problems],
        }
        for (fault, command), tries in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--steps", type=int, default=10, help="at most, per command")
    parser.add_argument("--jobs", type=int, default=1, help="parts at a time")
    parser.add_argument("--out", type=Path, help="rows of parts not run again stay")
    args = parser.parse_args()
    parts, left_out = args.only or [*PARTS], []
    if not ends.can_mount():
        left_out.append("real disks, and users without a home: need root on Linux")
        parts = [part for part in parts if part != "disks"]
    rows: list[dict[str, Any]] = []
    if args.out and args.out.exists():
        earlier = json.loads(args.out.read_text(encoding="utf-8"))["rows"]
        rows = [row for row in earlier if row["part"] not in parts]
    report: dict[str, Any] = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        running = {pool.submit(run_part, part, args.steps): part for part in parts}
        for done in as_completed(running):
            rows += rows_of(running[done], done.result())
            rows.sort(key=lambda row: [*PARTS].index(row["part"]))
            report = {
                "tries": sum(row["tries"] for row in rows),
                "survived": sum(row["survived"] for row in rows),
                "left_out": left_out,
                "rows": rows,
                **provenance(),
            }
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps(report, indent=1) + "\n"
                args.out.write_text(text, encoding="utf-8")
    names = ("fault", "command", "tries", "survived")
    lines = [names, *(tuple(row[name] for name in names) for row in rows)]
    print(table(lines, "< < > >"))
    print(json.dumps(report))
    sys.exit(report["survived"] < report["tries"])


if __name__ == "__main__":
    main()
