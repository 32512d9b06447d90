"""Install the package as strangers would, in clean environments, and use it there.

    python scripts/try_installs.py [PYTHON ...] [--model PATH] [--out FILE]

Builds wheel and sdist, then makes an environment for each interpreter (this one, if
none is named) and each of: the wheel with the newest dependencies, the wheel with the
oldest that pyproject.toml allows, the sdist. In each: `pip check`, `tova-mlx
--version`, `scripts/installed.py` (the public API on a tiny model, from outside the
checkout) and, if there is a model, `tova-mlx generate`. mypy and pyright read a
program that uses the package there. The last line is JSON; exit 1 if anything failed.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from common import ROOT, finish, provenance

PROGRAM = ROOT / "scripts" / "installed.py"


class Kind(NamedTuple):
    """What is installed: wheel or sdist, with dependencies as old as allowed or not."""

    suffix: str
    oldest: bool

    def __str__(self) -> str:
        name = "wheel" if self.suffix == ".whl" else "sdist"
        return f"{name}, {'oldest' if self.oldest else 'newest'}"


KINDS = [Kind(".whl", False), Kind(".whl", True), Kind(".tar.gz", False)]


def run(command: list[Any], where: Path) -> str:
    """Run a command; return what it said, or raise RuntimeError with its end."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=where,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        said = "\n".join(done.stdout.splitlines()[-15:])
        raise RuntimeError(f"{' '.join(map(str, command))}\n{said}")
    return done.stdout


def environment(python: str, where: Path) -> Path:
    """Make a clean environment; return its interpreter."""
    run([python, "-m", "venv", where], ROOT)
    return where / "bin" / "python"


def oldest_allowed(wheel: Path) -> list[str]:
    """Constraints that hold each dependency at the lower bound it is given."""
    with zipfile.ZipFile(wheel) as files:
        name = next(n for n in files.namelist() if n.endswith("/METADATA"))
        metadata = files.read(name).decode()
    wanted = r"^Requires-Dist: ([\w-]+)(?:\[.*?\])?[^;\n]*>=([\d.]+)(?!.*extra ==)"
    names = dict(re.findall(wanted, metadata, re.MULTILINE))
    # A patch level that was never published is any of its minor version.
    return [
        f"{name}~={version}.0" if version.count(".") < 2 else f"{name}=={version}"
        for name, version in names.items()
    ]


def build(where: Path) -> dict[str, Path]:
    """Build the sdist, and the wheel from it; return both by their suffix."""
    python = environment(sys.executable, where / "build")
    run([python, "-m", "pip", "install", "-q", "build", "twine"], where)
    run([python, "-m", "build", "-o", where / "dist", ROOT], where)
    made = sorted((where / "dist").iterdir())
    run([python, "-m", "twine", "check", "--strict", *made], where)
    return {
        suffix: next(f for f in made if f.name.endswith(suffix))
        for suffix in (".whl", ".tar.gz")
    }


def try_install(
    python: str, files: dict[str, Path], kind: Kind, model: Path | None
) -> dict[str, Any]:
    """Install one kind in an environment of its own and use it: what it found."""
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        inside = environment(python, where / "env")
        pinned = where / "oldest.txt"
        pinned.write_text(
            "\n".join(oldest_allowed(files[".whl"]) if kind.oldest else [])
        )
        command = [
            inside,
            "-m",
            "pip",
            "install",
            "-q",
            "-c",
            pinned,
            files[kind.suffix],
        ]
        try:
            run(command, where)
            run([inside, "-m", "pip", "check"], where)
            told = run([inside.with_name("tova-mlx"), "--version"], where)
            said = run([inside, "-W", "error::SyntaxWarning", PROGRAM], where)
            if model is not None:
                options = ["Hello", "--model", model, "--max-kv-size", "64"]
                command = [inside.with_name("tova-mlx"), "generate", *options]
                run([*command, "--max-tokens", "8"], where)
            versions = dict(part.split() for part in said.splitlines()[-1].split(", "))
            return {"passed": told.split()[-1] == versions["tova_mlx"], **versions}
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return {"passed": False, "error": str(error).splitlines()[-1]}


def check_types(python: str, wheel: Path) -> dict[str, Any]:
    """Have type checkers read a program that uses the installed package.

    pyright is that of the environment that runs this, for it brings Node.
    """
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        inside = environment(python, where / "env")
        run([inside, "-m", "pip", "install", "-q", wheel, "mypy"], where)
        program = where / "program.py"
        program.write_text(PROGRAM.read_text(encoding="utf-8"), encoding="utf-8")
        mypy = [inside, "-m", "mypy", "--strict", "--follow-imports=silent"]
        checkers = {
            "mypy": [*mypy, "--disable-error-code=no-untyped-call", program],
            "pyright": [
                sys.executable,
                "-m",
                "pyright",
                "--pythonpath",
                inside,
                program,
            ],
        }
        found = {}
        for name, command in checkers.items():
            try:
                run(command, where)
                found[name] = True
            except RuntimeError as error:
                print(error, file=sys.stderr)
                found[name] = False
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", nargs="*", default=[sys.executable])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {**provenance(), "installs": []}
    with tempfile.TemporaryDirectory() as folder:
        files = build(Path(folder))
        for python in args.python:
            for kind in KINDS:
                found = try_install(python, files, kind, args.model)
                report["installs"].append({"what": str(kind), **found})
                print(python, kind, found, flush=True)
        report["types"] = check_types(args.python[-1], files[".whl"])
    report["tried"] = len(report["installs"])
    passed = [found["passed"] for found in report["installs"]]
    report["passed"] = sum(passed)
    finish(report, args.out)
    sys.exit(not (all(passed) and all(report["types"].values())))


if __name__ == "__main__":
    main()
