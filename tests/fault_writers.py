"""The commands that write files, and what a fault in the midst of it must not do.

After a kill, a full disk or Ctrl-C at any step: what was there is there, nothing half
written is taken for whole, and the same command, started again, leaves what it leaves
undisturbed.
"""

import json
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fault_model import make_wheel
from faults import Done, Place

_CLI = "-m tova_mlx"
_MODEL = "--model {model}"
_EVAL = f"{_MODEL} --policy tova --max-kv-size 48 --out {{work}}/out"
_RECALL = "--max-kv-size 64 --recall 32 --policy fade"
_CHAT = "/load {work}/talk\nMore of it\n/save {work}/talk\n"
_FIRST_CHAT = "Some words\n/save {work}/talk\n"
# Of rows, what differs from run to run, or says how a run was begun.
_PASSING = {"command", "date"}
_TIMED = {"value", "seconds", "p20", "p80", "bound_ms", "weights_bytes"}
_TIMED |= {f"ratio_to_{name}" for name in ("bound", "full", "first_context")}


@dataclass(frozen=True)
class Writer:
    """A command that writes files in `work`.

    words, stdin: the command; before: words and stdin of one that was there earlier.
    goes_on: it says what failed and goes on, as a chat does.
    """

    name: str
    words: str
    stdin: str = ""
    before: tuple[str, str] | None = None
    goes_on: bool = False


def _after_another(name: str, words: str, old: str, new: str, **how: Any) -> Writer:
    """A command after the same with other words."""
    return Writer(name, words, before=(words.replace(new, old), ""), **how)


_chat = f"{_CLI} chat {_MODEL} --max-kv-size 64 --max-tokens 4"
_archiving = (
    f"{_CLI} chat {_MODEL} {_RECALL} --max-tokens 4 --archive {{work}}/archive "
    f"--system-prompt {'x' * 300}"
)
WRITERS = [
    Writer("chat /save", _chat, _CHAT, (_chat, _FIRST_CHAT), goes_on=True),
    Writer(
        "chat --archive", _archiving, _CHAT, (_archiving, _FIRST_CHAT), goes_on=True
    ),
    _after_another(
        "run cache_prompt",
        f"{_CLI} run --max-kv-size 64 cache_prompt {_MODEL} --prompt Some_words "
        "--prompt-cache-file {work}/prompt.safetensors",
        "Other_words",
        "Some_words",
    ),
    _after_another(
        "inspect --out",
        f"{_CLI} inspect {{novel}} {_MODEL} --tokens 120 --max-kv-size 48 "
        "--out {work}/page.html",
        "--tokens 90",
        "--tokens 120",
    ),
    _after_another(
        "eval perplexity",
        f"{_CLI} eval perplexity {{novel}} {_EVAL} --context 100 --tokens 200",
        "--policy window",
        "--policy tova",
    ),
    _after_another(
        "eval needle",
        f"{_CLI} eval needle --text {{novel}} {_EVAL} --length 750 --depth 0.5 "
        "--cases 1 --kind digits",
        "--policy window",
        "--policy tova",
    ),
    _after_another(
        "eval kept",
        f"{_CLI} eval kept {{novel}} {_EVAL} --tokens 200",
        "--policy window",
        "--policy tova",
    ),
    _after_another(
        "eval longrange",
        f"{_CLI} eval longrange --text {{novel}} {_EVAL} --examples 2 "
        "--story-tokens 100 --max-tokens 8",
        "--policy window",
        "--policy tova",
    ),
    Writer(
        "bench --out",
        f"{_CLI} bench {_EVAL} --context 60 --context 90 --steps 5 --bandwidth 10",
    ),
    Writer(
        "generate --archive",
        f"{_CLI} generate --prompt-file {{novel}} {_MODEL} {_RECALL} --max-tokens 4 "
        "--prefill-step-size 500 --archive {work}/archive",
    ),
    Writer("prepare_demo_model", "{tests}/fault_model.py {root}"),
]


# Whether what is in a file is whole


def is_whole_safetensors(data: bytes) -> bool:
    """Whether a header is followed by exactly the bytes that it names."""
    if len(data) < 8:
        return False
    (n,) = struct.unpack_from("<Q", data)
    if len(data) < 8 + n:
        return False
    header = json.loads(data[8 : 8 + n])
    header.pop("__metadata__", None)
    ends = (entry["data_offsets"][1] for entry in header.values())
    return len(data) == 8 + n + max(ends, default=0)


def is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def are_whole_lines(data: bytes) -> bool:
    """All but the last, which the next run drops."""
    return all(map(is_json, data.split(b"\n")[:-1]))


WHOLE: dict[str, Callable[[bytes], bool]] = {
    "safetensors": is_whole_safetensors,
    "html": lambda data: data.rstrip().endswith(b"</html>"),
    "png": lambda data: data.startswith(b"\x89PNG") and b"IEND" in data[-12:],
    "jsonl": are_whole_lines,
    "npy": lambda data: data.startswith(b"\x93NUMPY") and len(data) > 128,
    "json": is_json,
}


def torn(files: dict[str, bytes]) -> list[str]:
    """Names of files that are not whole, but for those in hidden directories."""
    return [
        name
        for name, data in files.items()
        if not any(part.startswith(".") for part in name.split("/"))
        and (check := WHOLE.get(name.rpartition(".")[2]))
        and not check(data)
    ]


def lost(before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    """Names of files that are gone, or have lost a row."""
    gone = [name for name in before if name not in after]
    for name, data in before.items():
        if name.endswith(".jsonl") and not after.get(name, b"").startswith(data):
            gone.append(name)
    return gone


def alike(one: dict[str, bytes], other: dict[str, bytes]) -> bool:
    """Whether two runs left the same files, and in them the same rows."""
    if one.keys() != other.keys():
        return False
    lines = [name for name in one if name.endswith(".jsonl")]
    return all(_same(_rows(one[name]), _rows(other[name])) for name in lines)


def _rows(data: bytes) -> list[dict[str, Any]]:
    """Rows in order; of a case that was timed again the newest counts."""
    rows = [json.loads(line) for line in data.splitlines()]
    if not rows or rows[0]["task"] != "bench":
        return [_without(row, _PASSING) for row in rows]
    rows = [_without(row, _PASSING | _TIMED) for row in rows]
    return sorted({json.dumps(row): row for row in rows}.items())


def _without(row: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in names}


def _same(one: Any, other: Any) -> bool:
    """Whether values of JSON are the same, numbers but for how they were rounded."""
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = ((one[name], other[name]) for name in one if name in other)
        return one.keys() == other.keys() and all(_same(*pair) for pair in pairs)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-6)
    return one == other


# A command that is disturbed, and the next start


@dataclass(frozen=True)
class Undisturbed:
    """What a command starts from, what it leaves, and its steps."""

    before: dict[str, bytes]
    after: dict[str, bytes]
    steps: list[str]
    out: str

    @classmethod
    def of(cls, place: Place, writer: Writer) -> "Undisturbed":
        place.clear()
        if "fault_model" in writer.words and not (place.root / "wheels").exists():
            make_wheel(place.root)
        if writer.before is not None:
            earlier = place.run(*writer.before)
            assert earlier.code == 0, earlier
        before = place.files()
        done = place.run(writer.words, writer.stdin, ("none", 0))
        assert (done.code, done.errors) == (0, []), done
        return cls(before, place.files(), place.steps(), done.out)


def chosen_steps(steps: list[str], most: int) -> list[int]:
    """Numbers of steps: of those that differ in numbers only, the first and the last.

    At most so many, spread.
    """
    groups: dict[str, list[int]] = {}
    for i, step in enumerate(steps):
        # Names of directories that are made by chance, and numbers.
        name = re.sub(r"\.tova_mlx-\w+|[0-9a-f]{12}|\d+", "#", step)
        groups.setdefault(name, []).append(i)
    some = sorted({i for numbers in groups.values() for i in (numbers[0], numbers[-1])})
    if len(some) > most:
        some = [some[i * len(some) // most] for i in range(most)]
    return some


def disturb(
    place: Place, writer: Writer, calm: Undisturbed, kind: str, at: int
) -> list[str]:
    """What is wrong after a fault at a step, and after the next start."""
    place.restore(calm.before)
    done = place.run(writer.words, writer.stdin, (kind, at))
    there = place.files()
    problems = wrong_end(writer, calm, kind, at, done)
    problems += [f"{name} is torn" for name in torn(there)]
    problems += [f"{name} is lost" for name in lost(calm.before, there)]
    again = place.run(writer.words, writer.stdin)
    if again.code or again.errors or again.has_traceback:
        problems.append(f"the next start fails: {again.last}")
    left = place.files()
    if left.keys() != calm.after.keys():
        names = sorted(left.keys() ^ calm.after.keys())
        problems.append(f"the next start leaves {names}")
    elif not alike(left, calm.after):
        problems.append("the next start leaves other contents")
    problems += [f"then {name} is torn" for name in torn(left)]
    return problems


def wrong_end(
    writer: Writer, calm: Undisturbed, kind: str, at: int, done: Done
) -> list[str]:
    """What is wrong with how a disturbed command ended."""
    if done.has_traceback:
        return [f"a traceback: {done.last}"]
    if kind != "full" and "bench" in writer.words and done.code == 1:
        # It was the process that reads.
        return [] if len(done.errors) == 1 else [f"exit 1: {done.last}"]
    if kind == "kill":
        return [] if done.code == -9 else [f"exit {done.code}, not killed"]
    if kind == "interrupt":
        ends = done.code == 130 and done.err.rstrip().endswith("Interrupted.")
        return [] if ends else [f"exit {done.code} after Ctrl-C: {done.last}"]
    needing = ("open ", "write ", "mkdir ", "mlx ")
    if not any(step.startswith(needing) for step in calm.steps[at:]):
        return [] if done.code == 0 else [f"exit {done.code}"]
    expected = (0, 1) if writer.goes_on else (1,)
    if done.code not in expected:
        return [f"exit {done.code} on a full disk: {done.last}"]
    if not done.errors or (not writer.goes_on and len(done.errors) > 1):
        return [f"{len(done.errors)} lines say that the disk is full: {done.last}"]
    return []
