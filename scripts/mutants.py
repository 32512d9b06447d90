"""Mistakes made in the core on purpose: which tests see each of them.

    python scripts/mutants.py --out results/trust/mutants.json
    python scripts/mutants.py --area scan --out results/trust/mutants.json
    python scripts/mutants.py --only "a block evicts a step late"

Puts the mutants of tests/mutants, one after the other, into a copy of the package and
runs the tests of their area on it until one fails. First all of these tests must pass on
a copy without a mistake. `--out` takes the results of the areas that were
run, and leaves those of others there. The last line is JSON.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TESTS_AT = ROOT / "tests"
sys.path.insert(0, str(TESTS_AT))

from mutants import MUTANTS, TESTS, Mutant  # noqa: E402

# What pytest says with -rfE of a test that failed.
_FAILED = re.compile(r"^(?:FAILED|ERROR) \S*?(test_\w+\.py)(?:::(\w+))?", re.M)


def place_of(mutant: Mutant, package: Path) -> Path:
    """The file that has the text, once; raises SystemExit if none or several do."""
    counts = {
        file: n
        for file in sorted(package.rglob("*.py"))
        if (n := file.read_text(encoding="utf-8").count(mutant.old))
    }
    if sum(counts.values()) != 1:
        there = {str(f.relative_to(package)): n for f, n in counts.items()}
        raise SystemExit(f"{mutant.name}: {mutant.old!r} must be there once: {there}")
    return next(iter(counts))


@contextmanager
def copied(mutant: Mutant | None) -> Iterator[tuple[Path, str]]:
    """A directory with the package in it, with a mistake, and the file that has it."""
    with tempfile.TemporaryDirectory(prefix="tova_mlx-mutant-") as place:
        package = Path(place) / "tova_mlx"
        shutil.copytree(ROOT / "tova_mlx", package)
        where = ""
        if mutant is not None:
            file = place_of(mutant, package)
            text = file.read_text(encoding="utf-8")
            file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
            where = str(file.relative_to(package))
        yield Path(place), where


def run(place: Path, tests: Sequence[str], limit: float) -> tuple[str, str]:
    """Run tests on the package in a directory: passed, failed or late, and who failed.

    limit: seconds.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-rfE", "--tb=line"]
    command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    command += ["-p", "no:cacheprovider", "--hypothesis-seed=0"]
    command += ["-m", "not real_model and not every_model"]
    variables = {"PYTHONPATH": str(place), "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *(str(TESTS_AT / test) for test in tests)],
        cwd=place,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return "late", ""
    if process.returncode == 0:
        return "passed", ""
    found = _FAILED.search(said)
    if found is None:
        # A crash of the interpreter has no summary; nor has a wrong command.
        if process.returncode in (2, 3, 4, 5):
            raise SystemExit(f"pytest could not run {tests}:\n{said}")
        return "failed", f"ended with {process.returncode}"
    return "failed", "::".join(part for part in found.groups() if part)


def tests_of(mutants: Sequence[Mutant]) -> list[str]:
    """The tests that may see these mutants, each once."""
    wanted = [t for m in mutants for t in (*m.tests, *TESTS[m.area])]
    return list(dict.fromkeys(wanted))


def check_right(mutants: Sequence[Mutant], limit: float) -> float:
    """Run all tests of mutants on what is right; seconds. Raises SystemExit."""
    begun = time.monotonic()
    with copied(None) as (place, _):
        outcome, who = run(place, tests_of(mutants), limit)
    if outcome != "passed":
        raise SystemExit(f"Without a mistake the tests {outcome}: {who}")
    return time.monotonic() - begun


def try_mutant(mutant: Mutant, limit: float) -> dict[str, Any]:
    """What became of one mutant."""
    begun = time.monotonic()
    with copied(mutant) as (place, where):
        outcome, who = run(place, tests_of([mutant]), limit)
    row: dict[str, Any] = {"mutant": mutant.name, "file": where}
    row["outcome"] = {"passed": "survived", "failed": "killed"}.get(outcome, outcome)
    row["seconds"] = round(time.monotonic() - begun, 1)
    if who:
        row["by"] = who
    if mutant.stays:
        row["stays"] = mutant.stays
    return row


def run_area(mutants: Sequence[Mutant], limit: float) -> dict[str, Any]:
    """What became of an area's mutants; told as it comes."""
    rows = []
    for mutant in mutants:
        rows.append(try_mutant(mutant, limit))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    counts = Counter(row["outcome"] for row in rows)
    files = Counter(row["by"].partition("::")[0] for row in rows if "by" in row)
    return {
        "mutants": len(rows),
        **counts,
        "killed_by": dict(files.most_common()),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "rows": rows,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--area", action="append", choices=list(TESTS))
    parser.add_argument("--only", action="append", metavar="NAME")
    parser.add_argument("--limit", type=float, default=300, help="seconds a mutant")
    parser.add_argument("--out", type=Path, help="not with --only")
    args = parser.parse_args()
    if args.only and args.out:
        parser.error("--out takes whole areas. Leave --only out.")
    if unknown := set(args.only or ()) - {m.name for m in MUTANTS}:
        parser.error(f"no mutant is called {', '.join(sorted(unknown))}")
    from common import provenance

    wanted = [
        m
        for area in args.area or TESTS
        for m in MUTANTS
        if m.area == area and (args.only is None or m.name in args.only)
    ]
    seconds = check_right(wanted, 20 * args.limit)
    print(f"what is right passed in {seconds:.0f} s", file=sys.stderr)
    areas = {}
    for area in dict.fromkeys(m.area for m in wanted):
        found = run_area([m for m in wanted if m.area == area], args.limit)
        areas[area] = found | provenance()
    total: Counter[str] = Counter()
    if args.out:
        if args.out.exists():
            areas = json.loads(args.out.read_text(encoding="utf-8"))["areas"] | areas
            areas = {area: areas[area] for area in TESTS if area in areas}
        total.update({"mutants": sum(a["mutants"] for a in areas.values())})
        total.update(r["outcome"] for a in areas.values() for r in a["rows"])
        args.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**total, "areas": areas}, indent=1)
        args.out.write_text(text + "\n", encoding="utf-8")
    brief = [
        {"area": area, **{k: v for k, v in found.items() if k != "rows"}}
        for area, found in areas.items()
    ]
    survivors = [
        row["mutant"]
        for found in areas.values()
        for row in found["rows"]
        if row["outcome"] != "killed" and "stays" not in row
    ]
    print(json.dumps({**total, "areas": brief, "survivors": survivors}))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
