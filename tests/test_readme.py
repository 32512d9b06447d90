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
from mlx_lm import server
from test_serve import serving

from tova_mlx import revert
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


TABLES = ["quality", "packed", "perplexity", "needle", "longrange", "kept"]


@pytest.mark.parametrize("name", TABLES)
def test_the_quality_tables_are_those_of_the_results(name):
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "quality_table.py")],
        capture_output=True,
        text=True,
        check=True,
    )
    blocks = [
        text.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]
        for text in (README, done.stdout)
    ]
    assert blocks[0].strip() == blocks[1].strip()
    assert "fade" in blocks[0]


@pytest.fixture
def port(demo_path):
    with serving("--model", str(demo_path), "--log-level", "ERROR") as (_, client):
        yield client.base_url.port


@pytest.mark.real_model
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_run(program, demo, monkeypatch, capsys, tmp_path, request):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mlx_lm, "load", lambda _: demo)
    if "8080" in program:
        program = program.replace("8080", str(request.getfixturevalue("port")))
    names = {}
    exec(compile(program, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert bool(printed.strip()) == ("print(" in program)
    if "cache" in names:
        assert len(names["cache"]) == len(demo[0].layers)
    revert(demo[0])


@pytest.mark.real_model
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_run(command, demo_path, monkeypatch, tmp_path):
    name, *arguments = command
    if name == ".venv/bin/tova-mlx":
        monkeypatch.chdir(tmp_path)
        (tmp_path / "scripts").symlink_to(ROOT / "scripts")
        # A server that stops when it would listen, and chats that are left.
        monkeypatch.setattr(
            server, "_run_http_server", lambda *a: a[-1].stop_and_join()
        )
        monkeypatch.setattr(os, "_exit", lambda code: None)
        typed = "q\n" if arguments[0] == "run" else "/exit\n"
        result = CliRunner().invoke(main, arguments, input=typed)
        assert result.exit_code == 0, (result.stderr, result.exception)
        assert result.stdout.strip() or arguments[0] in ("chat", "serve")
    else:
        assert name in ("scripts/demo.sh", "scripts/test.sh")
        assert os.access(ROOT / name, os.X_OK)
        subprocess.run(["bash", "-n", ROOT / name], check=True)


def test_completion_knows_the_commands():
    shell = {"COMP_WORDS": "tova-mlx se", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tova_mlx"],
        env={**os.environ, **shell, "_TOVA_MLX_COMPLETE": "bash_complete"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "plain,serve\n"


def test_the_readme_shows_programs_and_commands():
    assert len(PROGRAMS) >= 2
    assert len(COMMANDS) >= 5
