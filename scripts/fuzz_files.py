"""Hostile files, thousands of them: a line of error or a right result, nothing else.

    python scripts/fuzz_files.py --inputs 12000 --out results/trust/fuzz.json
    python scripts/fuzz_files.py --only "saved cache, parts" 1234

Damages whole files of every kind that the product reads (tests/hostile*.py), and reads
them in worker processes with a limit of memory. A traceback, a process that ends, one
that hangs, memory that runs away, and a cache other than the one saved are failures:
they are printed with the number that `--only` repeats them by, with the same `--seed`.
One kind goes through the whole command line, each input in a process of its own.
Exit code 1 if there was a failure. The last line is JSON.
"""

import argparse
import importlib
import json
import os
import resource
import selectors
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODULES = (
    *("hostile_caches", "hostile_own", "hostile_rows", "hostile_texts"),
    *("hostile_archives", "hostile_models", "hostile_commands"),
)
# Of all inputs, the shares of kinds; of others, 1.
SHARES = {
    "saved cache, bytes": 8,
    "saved cache, parts": 4,
    "saved cache of mlx-lm's own": 6,
    "rows of an archive": 5,
    "model directory": 1.5,
    "archive in use": 0.2,
    "command line": 0.04,
}
# Bytes that a worker may have mapped, and that a file of its may have.
MAPPED, WRITTEN = 8 << 30, 1 << 30
FAILED = "failed"


def all_kinds() -> dict[str, Any]:
    """Every kind of file, by name."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tova_mlx.hooks.blas import load_openblas

    load_openblas()
    found = [k for m in MODULES for k in importlib.import_module(m).kinds()]
    return {kind.name: kind for kind in found}


def work(name: str, start: int, stop: int, seed: int) -> None:
    """In a process of its own: a line when an input begins, and what came of it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (WRITTEN, WRITTEN))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MAPPED, MAPPED))
    # What libraries print is not an answer.
    said = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(**values: Any) -> None:
        said.write(json.dumps(values) + "\n")
        said.flush()

    kind = all_kinds()[name]
    import hostile

    with tempfile.TemporaryDirectory() as place:
        kind.make(Path(place))
        for i in range(start, stop):
            tell(began=i)
            result, found = hostile.attempt(kind, i, seed)
            tell(number=i, result=result, how=found.how, said=found.said)


def results(
    name: str, start: int, stop: int, seed: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """What came of each input; a worker that ends or hangs is begun again after it."""
    while start < stop:
        command = [sys.executable, __file__, "--work", name]
        command += map(str, (start, stop, seed))
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if not os.environ.get("VERBOSE") else None,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        ) as worker:
            try:
                for line in _lines(worker, seconds):
                    if "number" in line:
                        start = line["number"] + 1
                        yield line
            finally:
                worker.kill()
        if start < stop:
            why = f"no answer in {seconds:g} s"
            if worker.returncode != -9:
                why = f"the process ended with {worker.returncode}"
            yield {"number": start, "result": FAILED, "how": "", "said": why}
            start += 1


def _lines(worker: subprocess.Popen, seconds: float) -> Iterator[dict[str, Any]]:
    """What a worker says, until it is silent for too long or has ended."""
    assert worker.stdout is not None
    assert worker.stderr is not None
    outputs, waiting, began = selectors.DefaultSelector(), b"", time.monotonic()
    outputs.register(worker.stdout, selectors.EVENT_READ)
    outputs.register(worker.stderr, selectors.EVENT_READ)
    # Until all whole files are made.
    allowed = 10 * seconds
    while time.monotonic() - began < allowed:
        for key, _ in outputs.select(0.5):
            data = os.read(key.fd, 1 << 16)
            if key.fileobj is worker.stderr:
                if not data:
                    outputs.unregister(worker.stderr)
                continue
            if not data:
                worker.wait()
                return
            *lines, waiting = (waiting + data).split(b"\n")
            began, allowed = time.monotonic(), seconds
            yield from map(json.loads, lines)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All inputs asked for; failures are printed."""
    names = args.kind or list(all_kinds())
    shares = {name: SHARES.get(name, 1) for name in names}
    report: dict[str, Any] = {"inputs": 0, FAILED: 0, "kinds": {}, "failures": []}
    begun = time.time()
    for name in names:
        n = max(1, round(args.inputs * shares[name] / sum(shares.values())))
        counts: Counter[str] = Counter()
        hows: Counter[str] = Counter()
        seconds = args.seconds * (5 if name == "command line" else 1)
        for found in results(name, 0, n, args.seed, seconds):
            counts[found["result"]] += 1
            hows[found["how"].partition(" and ")[0]] += 1
            if found["result"] == FAILED:
                report["failures"].append({"kind": name, "number": found["number"]})
                print(f"{name} {found['number']}: {found['said']}", file=sys.stderr)
        took = time.time() - begun
        print(f"{took / 60:.1f} min, {name}: {dict(counts)}", file=sys.stderr)
        row = {"inputs": n, "right": 0, "refused": 0, FAILED: 0, **counts}
        report["kinds"][name] = row | {"mutated": dict(sorted(hows.items()))}
        report["inputs"] += n
        report[FAILED] += counts[FAILED]
    return {
        "seed": args.seed,
        "minutes": round((time.time() - begun) / 60, 1),
        **report,
    }


def main() -> int:
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], *map(int, sys.argv[3:]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=12_000)
    parser.add_argument("--kind", action="append", help="one kind; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20, help="for an input")
    parser.add_argument("--only", nargs=2, metavar=("KIND", "NUMBER"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.only:
        name, number = args.only[0], int(args.only[1])
        (found,) = results(name, number, number + 1, args.seed, args.seconds)
        print(json.dumps(found, indent=1).replace("\\n", "\n"))
        return int(found["result"] == FAILED)
    from common import finish, provenance

    report = run(args) | provenance()
    finish(report, args.out, indent=1)
    return int(report[FAILED] > 0)


if __name__ == "__main__":
    sys.exit(main())
