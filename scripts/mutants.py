"""Mistakes made in the core on purpose: which tests see each of them.

    python scripts/mutants.py --out results/trust/mutants.json
    python scripts/mutants.py --again --area scan --out results/trust/mutants.json
    python scripts/mutants.py --only "a block evicts a step late"

Puts the mutants of tests/core_bugs, one after the other, into a copy of the package and
runs the tests of their area on it until one fails. In the end all tests that saw a
mistake must pass on a copy without one. `--out` takes the results of what was run, and
keeps those of other mutants that are there; `--again` leaves out whom a test has seen
already. The last line is JSON.
"""

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

os.environ["OPENBLAS_NUM_THREADS"] = "1"

import mlx_lm.server  # noqa: F401
import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS_AT = ROOT / "tests"
sys.path.insert(0, str(TESTS_AT))
# A test's own bytecode, or it is compiled for every mutant.
sys.dont_write_bytecode = False

from core_bugs import MUTANTS, TESTS, Mutant  # noqa: E402

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
def with_mistake(mutant: Mutant, place: Path) -> Iterator[str]:
    """Have a mistake in the package in a directory; gives the file that has it."""
    file = place_of(mutant, place / "tova_mlx")
    right, when = file.read_text(encoding="utf-8"), file.stat()
    file.write_text(right.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        yield str(file.relative_to(place / "tova_mlx"))
    finally:
        file.write_text(right, encoding="utf-8")
        # Bytecode goes by it.
        os.utime(file, ns=(when.st_atime_ns, when.st_mtime_ns))


def _be_pytest(place: Path, output: Path, tests: Sequence[str]) -> NoReturn:
    """Run tests in a process of its own, and end it."""
    code = 70
    try:
        os.setsid()
        said = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.chdir(place)
        sys.path.insert(0, str(place))
        # For processes that tests start.
        os.environ["PYTHONPATH"] = str(place)
        code = pytest.main(
            [
                *("-x", "-rfE", "--tb=line", "--color=no", "--assert=plain"),
                *("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)),
                *("-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:anyio"),
                "--hypothesis-seed=0",
                *("-m", "not real_model and not every_model"),
                *(str(TESTS_AT / test) for test in tests),
            ]
        )
    except BaseException:
        traceback.print_exc()
    finally:
        # Nothing of the parent's is to be cleaned up here.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(code))


def run(place: Path, tests: Sequence[str], limit: float) -> tuple[str, str]:
    """Run tests on the package in a directory: passed, failed or late, and who failed.

    limit: seconds. In a fork of this process, which has imported all but the package.
    """
    assert "tova_mlx" not in sys.modules
    output = place / "said"
    if not (child := os.fork()):
        _be_pytest(place, output, tests)
    end = time.monotonic() + limit
    ended = (0, 0)
    try:
        while ended[0] == 0 and time.monotonic() < end:
            time.sleep(0.05)
            ended = os.waitpid(child, os.WNOHANG)
    finally:
        # Late, or this process was interrupted.
        if ended[0] == 0:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if ended[0] == 0:
        return "late", ""
    code = os.waitstatus_to_exitcode(ended[1])
    if code == 0:
        return "passed", ""
    said = output.read_text(encoding="utf-8", errors="replace")
    found = _FAILED.search(said)
    if found is None:
        if code > 1:
            raise SystemExit(f"pytest could not run {tests}:\n{said}")
        # A crash has no summary.
        return "failed", f"ended with {code}: {said.strip()[-60:]}"
    return "failed", "::".join(part for part in found.groups() if part)


def check_right(rows: Iterable[dict[str, Any]], place: Path, limit: float) -> int:
    """Run all tests that saw a mistake without one; how many. Raises SystemExit."""
    tests = sorted({row["by"] for row in rows if "::" in row.get("by", "")})
    outcome, who = run(place, tests, limit) if tests else ("passed", "")
    if outcome != "passed":
        raise SystemExit(f"Without a mistake tests {outcome} too: {who}")
    return len(tests)


def try_mutant(mutant: Mutant, place: Path, limit: float) -> dict[str, Any]:
    """What became of one mutant."""
    begun = time.monotonic()
    with with_mistake(mutant, place) as where:
        tests = dict.fromkeys((*mutant.tests, *TESTS[mutant.area]))
        outcome, who = run(place, list(tests), limit)
    row: dict[str, Any] = {"mutant": mutant.name, "area": mutant.area, "file": where}
    row["outcome"] = {"passed": "survived", "failed": "killed"}.get(outcome, outcome)
    row["seconds"] = round(time.monotonic() - begun, 1)
    if who:
        row["by"] = who
    if mutant.stays:
        row["stays"] = mutant.stays
    return row


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What rows say together."""
    files = Counter(row["by"].partition("::")[0] for row in rows if "by" in row)
    return {
        "mutants": len(rows),
        **Counter(row["outcome"] for row in rows),
        "killed_by": dict(files.most_common()),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
    }


def report(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All rows, by mutant, in the order of the list, and what they say by area."""
    ordered = [rows[m.name] for m in MUTANTS if m.name in rows]
    parts = {a: [r for r in ordered if r["area"] == a] for a in TESTS}
    return {
        **{k: v for k, v in summary(ordered).items() if k != "killed_by"},
        "not_run": len(MUTANTS) - len(ordered),
        "areas": {area: summary(part) for area, part in parts.items() if part},
        "survivors": [
            {k: row[k] for k in ("mutant", "area", "outcome", "stays") if k in row}
            for row in ordered
            if row["outcome"] != "killed"
        ],
        "rows": ordered,
    }


def written(rows: dict[str, Any], out: Path | None, **more: Any) -> dict[str, Any]:
    """Write a report to a file, if there is one, and return it."""
    made = more | report(rows)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--area", action="append", choices=list(TESTS))
    parser.add_argument("--only", action="append", metavar="NAME")
    parser.add_argument("--limit", type=float, default=300, help="seconds a mutant")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--again", action="store_true", help="not those that were killed"
    )
    parser.add_argument("--unchecked", action="store_true", help="no check in the end")
    args = parser.parse_args()
    if unknown := set(args.only or ()) - {m.name for m in MUTANTS}:
        parser.error(f"no mutant is called {', '.join(sorted(unknown))}")
    rows: dict[str, dict[str, Any]] = {}
    if args.out and args.out.exists():
        before = json.loads(args.out.read_text(encoding="utf-8"))["rows"]
        rows = {row["mutant"]: row for row in before}
    done = [n for n, row in rows.items() if args.again and row["outcome"] == "killed"]
    wanted = [
        m
        for area in args.area or TESTS
        for m in MUTANTS
        if m.area == area
        and (args.only is None or m.name in args.only)
        and m.name not in done
    ]
    with tempfile.TemporaryDirectory(prefix="tova_mlx-mutants-") as name:
        place = Path(name)
        shutil.copytree(ROOT / "tova_mlx", place / "tova_mlx")
        for mutant in wanted:
            row = rows[mutant.name] = try_mutant(mutant, place, args.limit)
            print(json.dumps(row), file=sys.stderr, flush=True)
            written(rows, args.out)
        if not args.unchecked:
            n = check_right(rows.values(), place, 20 * args.limit)
            print(f"without a mistake {n} tests that saw one pass", file=sys.stderr)
    # It imports the package.
    from common import provenance

    made = written(rows, args.out, **provenance())
    print(json.dumps({k: v for k, v in made.items() if k != "rows"}))
    return 1 if any("stays" not in row for row in made["survivors"]) else 0


if __name__ == "__main__":
    sys.exit(main())
