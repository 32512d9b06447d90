"""What the README shows runs, and its figures are those of the committed results."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import mlx_lm
import pytest
from click.testing import CliRunner

from tova_mlx.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PROGRAMS = [code for kind, code in BLOCKS if kind == "python"]
COMMANDS = [
    shlex.split(line, comments=True)
    for kind, code in BLOCKS
    if kind == "console"
    for line in re.findall(r"^\$ (.*)$", code.replace("\\\n", ""), re.MULTILINE)
]


def test_the_quality_table_is_that_of_the_results():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "quality_table.py")],
        capture_output=True,
        text=True,
        check=True,
    )
    block = README.split("<!-- quality -->")[1].split("<!-- /quality -->")[0]
    assert block.strip() == done.stdout.strip()
    assert "fade" in block


@pytest.mark.real_model
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_run(program, demo, monkeypatch, capsys):
    monkeypatch.setattr(mlx_lm, "load", lambda _: demo)
    names = {}
    exec(compile(program, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert bool(printed.strip()) == ("print(" in program)
    if "cache" in names:
        assert len(names["cache"]) == len(demo[0].layers)


@pytest.mark.real_model
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_run(command, demo_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, *arguments = command
    if name == ".venv/bin/tova-mlx":
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.stderr
        assert result.stdout.strip()
    else:
        assert name in ("scripts/demo.sh", "scripts/test.sh")
        assert os.access(name, os.X_OK)
        subprocess.run(["bash", "-n", name], check=True)


def test_the_readme_shows_programs_and_commands():
    assert len(PROGRAMS) >= 2
    assert len(COMMANDS) >= 5
