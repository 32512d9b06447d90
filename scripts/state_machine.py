"""The cache contract as state machines, for hours, and bugs put in to see them found.

    python scripts/state_machine.py --sequences 20000 --out results/state_machine.json
    python scripts/state_machine.py --mutants --out results/state_machine_mutants.json

Draws sequences of everything that can be done to caches and batches (tests/machine.py)
and compares outputs, held positions, stored rows, offsets and bytes with the float64
oracle (tests/oracle.py) after every step; every tenth chunk on the Metal path, its
kernels compiled for the CPU and checked (needs clang, see tests/mslcheck). A failure is
printed, shrunk, and counted as a finding; copy it into tests/test_machine.py. Two
processes work in parallel; `--seed` makes a run repeatable. The last line is JSON.

`--mutants` puts each bug of `scripts/machine_bugs.py` into a copy of the package and
runs the machines on it until they fail.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHUNK = 250
# Which machine the chunks run, in turn.
TURNS = ["cache"] * 6 + ["batch"] * 2 + ["cache", "cache on kernels"]
MARK = "COUNTS "


def work(kind: str, sequences: int, seed: int, shrink: bool) -> int:
    """In a process of its own: one chunk. Prints the counts; 1 if it failed."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tova_mlx.hooks.blas import load_openblas

    load_openblas()
    import hypothesis
    import machine
    from hypothesis.stateful import run_state_machine_as_test

    base = machine.BatchMachine if kind.startswith("batch") else machine.CacheMachine
    drawn = {}
    if kind.endswith("kernels"):
        # One kind of heads: each other one would be compiled anew.
        batches = (1,) if base is machine.BatchMachine else (1, 1, 2)
        drawn = {"drawn": machine.setups(batches, heads=(4, 2))}
    seeded = hypothesis.seed(seed)(type("Seeded", (base,), drawn))
    phases = [hypothesis.Phase.generate] + [hypothesis.Phase.shrink] * shrink

    def run() -> None:
        run_state_machine_as_test(
            seeded,
            settings=hypothesis.settings(
                max_examples=sequences,
                stateful_step_count=20,
                deadline=None,
                database=None,
                phases=phases,
                suppress_health_check=list(hypothesis.HealthCheck),
            ),
        )

    try:
        if kind.endswith("kernels"):
            import mslcheck

            if reason := mslcheck.missing():
                print(f"kernels left out: {reason}", file=sys.stderr)
                return 0
            os.environ["TOVA_MLX_KERNELS"] = "on"
            with mslcheck.checked_kernels():
                run()
        else:
            run()
    finally:
        print(MARK + json.dumps(machine.COUNTS))
    return 0


def start(package: Path, kind: str, sequences: int, seed: int, shrink: bool):
    """Run `work` on the package in a directory; whether it passed, counts, stderr."""
    options = [str(package), kind, str(sequences), str(seed), str(int(shrink))]
    done = subprocess.run(
        [sys.executable, __file__, "--work", *options],
        env=os.environ | {"PYTHONPATH": str(package), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    lines = [s for s in done.stdout.splitlines() if s.startswith(MARK)]
    counts = Counter(json.loads(lines[-1][len(MARK) :])) if lines else Counter()
    return done.returncode == 0, counts, done.stderr


def long_run(args: argparse.Namespace) -> dict:
    """All the sequences asked for; prints what failed."""
    total: Counter = Counter()
    findings, begun = [], time.time()
    chunks = -(-args.sequences // CHUNK)

    def one(i: int):
        return start(ROOT, TURNS[i % len(TURNS)], CHUNK, args.seed + i, True)

    with ThreadPoolExecutor(args.processes) as pool:
        for i, (passed, counts, said) in enumerate(pool.map(one, range(chunks))):
            total += counts
            if not passed:
                findings.append(
                    {"machine": TURNS[i % len(TURNS)], "seed": args.seed + i}
                )
                print(said, file=sys.stderr)
            minutes = (time.time() - begun) / 60
            print(f"{minutes:.1f} min: {dict(total)}", file=sys.stderr)
    return {**total, "findings": findings, "minutes": round(minutes, 1)}


def mutants(args: argparse.Namespace) -> dict:
    """Which of the bugs the machines find, and after how many sequences."""
    from machine_bugs import BUGS

    def one(bug) -> dict:
        with tempfile.TemporaryDirectory() as place:
            package = Path(place)
            shutil.copytree(ROOT / "tova_mlx", package / "tova_mlx")
            for name, old, new in bug.edits:
                file = package / "tova_mlx" / name
                text = file.read_text(encoding="utf-8")
                if text.count(old) != 1:
                    raise SystemExit(
                        f"{name}: {old!r} is there {text.count(old)} times."
                    )
                file.write_text(text.replace(old, new), encoding="utf-8")
            row = {"bug": bug.what, "file": bug.edits[0].file, "found_by": None}
            for kind in bug.kinds:
                passed, counts, said = start(package, kind, 1500, args.seed, False)
                row["sequences"] = row.get("sequences", 0) + counts["sequences"]
                if not passed:
                    row["found_by"] = kind
                    lines = [s for s in said.splitlines() if "Error" in s]
                    row["said"] = lines[-1][:100] if lines else said[-100:]
                    break
            print(json.dumps(row), file=sys.stderr)
            return row

    with ThreadPoolExecutor(args.processes) as pool:
        rows = list(pool.map(one, BUGS))
    return {
        "mutants": len(rows),
        "found": sum(r["found_by"] is not None for r in rows),
        "rows": rows,
    }


def main() -> int:
    if sys.argv[1:2] == ["--work"]:
        _, _, _, kind, sequences, seed, shrink = sys.argv
        return work(kind, int(sequences), int(seed), shrink == "1")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sequences", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mutants", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from common import provenance

    result = mutants(args) if args.mutants else long_run(args)
    result |= provenance()
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
