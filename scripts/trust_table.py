"""Prints docs/trust.md's table of what was tried, from results/trust; --write puts it
there.

    python scripts/trust_table.py [--write]
"""

import json
import sys
from collections import Counter
from typing import Any

from common import ROOT, write_block

_PLACE = ROOT / "results" / "trust"


def _read(name: str) -> dict[str, Any]:
    return json.loads((_PLACE / name).read_text(encoding="utf-8"))


def _fuzz() -> tuple[str, str]:
    found = _read("fuzz.json")
    counts = Counter[str]()
    for kind in found["kinds"].values():
        counts.update({k: v for k, v in kind.items() if isinstance(v, int)})
    return (
        f"{found['inputs']:,} of {len(found['kinds'])} kinds",
        f"{counts['refused']:,} refused in a line, {counts['right']:,} right, "
        f"{found['failed']} failed",
    )


def _faults() -> tuple[str, str]:
    found = _read("faults.json")
    kinds = {row["fault"] for row in found["rows"]}
    commands = {row["command"] for row in found["rows"]}
    return (
        f"{found['tries']:,}: {len(kinds)} faults, {len(commands)} commands",
        f"{found['survived']:,} survived, {found['tries'] - found['survived']} not",
    )


def _server(name: str) -> tuple[str, str]:
    found = _read("server.json")[name]
    abuse = sum(sum(counts.values()) for counts in found["abuse"].values())
    margins = [each["margin"] for each in found["different"]]
    near = f" (a near-tie, {max(margins):.1g} apart)" if margins else ""
    return (
        f"{found['clients']} at once, {found['seconds'] / 60:.0f} min; "
        f"{found['answers_checked']} answers checked, {abuse} abusive requests",
        f"{found['equal']} as alone, {len(margins)} not{near}; "
        f"another's text {found['foreign_text']}; "
        f"{found['resident_warm'] >> 20:,} MiB, at the end "
        f"{found['resident_final'] >> 20:,}",
    )


def _mutants() -> tuple[str, str]:
    found = _read("mutants.json")
    result = f"{found['killed']} seen by a test"
    for what, stays in (("not", False), ("equivalent", True)):
        there = [s["mutant"] for s in found["survivors"] if ("stays" in s) is stays]
        if there:
            result += f"; {what}: " + ", ".join(f"“{name}”" for name in there)
    return f"{found['mutants']} in {len(found['areas'])} areas", result


def _installs() -> tuple[str, str]:
    tries = [
        install
        for file in sorted(_PLACE.glob("installs*.json"))
        for install in _read(file.name)["installs"]
    ]
    pythons = sorted({each["python"] for each in tries}, key=_numbers)
    return (
        f"{len(tries)}: wheel and sdist, oldest and newest dependencies, Python "
        + " and ".join(pythons),
        f"{sum(each['passed'] for each in tries)} passed",
    )


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def _machine() -> tuple[str, str]:
    found = json.loads(
        (ROOT / "results" / "state_machine.json").read_text(encoding="utf-8")
    )
    return (
        f"{found['sequences']:,} of {found['steps']:,} steps",
        f"{len(found['findings'])} findings",
    )


def table() -> str:
    """Markdown: what was tried, how often, what came of it, and the script."""
    rows = [
        ("hostile files", *_fuzz(), "fuzz_files.py"),
        ("sequences of uses of a cache", *_machine(), "state_machine.py"),
        ("faults", *_faults(), "faults.py"),
        ("clients of a server", *_server("tova"), "load_server.py"),
        ("the same with a draft model", *_server("draft"), "load_server.py"),
        ("mistakes put into the code", *_mutants(), "mutants.py"),
        ("installations", *_installs(), "try_installs.py"),
    ]
    lines = ["| what | tried | result | `scripts/` |", "|---|---|---|---|"]
    lines += [f"| {a} | {b} | {c} | `{d}` |" for a, b, c, d in rows]
    return "\n".join(lines)


def main() -> None:
    print(table())
    if "--write" in sys.argv[1:]:
        write_block("trust", table())


if __name__ == "__main__":
    main()
