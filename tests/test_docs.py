"""What the documentation shows runs, and its figures are those of the results."""

import json
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

from tova_mlx import POLICIES, revert
from tova_mlx.cli import main
from tova_mlx.storage.formats import BEST, CHANGES

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import common  # noqa: E402
import policy_table  # noqa: E402
import quality_table  # noqa: E402
import trust_table  # noqa: E402

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name_of(path):
    return str(path.relative_to(ROOT))


def blocks(kind):
    """The pages that have blocks of a kind, and their texts."""
    found = {p: BLOCK.findall(p.read_text(encoding="utf-8")) for p in PAGES}
    texts = {p: [code for k, code in all_ if k == kind] for p, all_ in found.items()}
    return {p: codes for p, codes in texts.items() if codes}


PROGRAMS = blocks("python")
# Each once, on however many pages it is.
COMMANDS = list(
    dict.fromkeys(
        tuple(shlex.split(line, comments=True))
        for codes in blocks("console").values()
        for code in codes
        for line in re.findall(r"^\$ (.*)$", code.replace("\\\n", ""), re.MULTILINE)
    )
)


@pytest.mark.parametrize("name", quality_table.TABLES)
def test_the_quality_tables_are_those_of_the_results(name):
    assert common.block(name) == quality_table.TABLES[name]()
    assert "fade" in common.block(name)


def test_the_table_of_what_was_tried_is_that_of_the_results():
    assert common.block("trust") == trust_table.table()


def test_the_table_of_policies_is_that_of_the_policies():
    assert common.block("policies") == policy_table.table()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 7000


def anchors(path):
    heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pictures_are_there_and_described(page):
    text = page.read_text(encoding="utf-8")
    for picture in re.findall(r'\b(?:src|srcset)="([^"]+)"', text):
        assert (page.parent / picture).exists(), picture
    for image in re.findall(r"<img [^>]*>", text):
        assert re.search(r'alt="[^"]{20,}"', image)


def test_every_page_is_listed():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in ROOT.glob("docs/*.md"):
        assert page.name == "README.md" or f"({page.name})" in index


@pytest.fixture
def port(demo_path):
    with serving("--model", str(demo_path), "--log-level", "ERROR") as (_, client):
        yield client.base_url.port


@pytest.mark.real_model
@pytest.mark.parametrize("page", PROGRAMS, ids=name_of)
def test_programs_run(page, demo, monkeypatch, capsys, tmp_path, request):
    """One after the other, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mlx_lm, "load", lambda _: demo)
    names = {}
    before = dict(POLICIES._registered)
    try:
        for program in PROGRAMS[page]:
            if "8080" in program:
                port = request.getfixturevalue("port")
                program = program.replace("8080", str(port))
            exec(compile(program, page.name, "exec"), names)
            printed = capsys.readouterr().out
            assert bool(printed.strip()) == ("print(" in program)
            if "cache" in names:
                assert len(names["cache"]) == len(demo[0].layers)
    finally:
        revert(demo[0])
        POLICIES._registered.clear()
        POLICIES._registered.update(before)


@pytest.mark.real_model
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_run(command, demo_path, monkeypatch, tmp_path):
    name, *arguments = command
    if name == ".venv/bin/tova-mlx":
        monkeypatch.chdir(tmp_path)
        (tmp_path / "scripts").symlink_to(ROOT / "scripts")
        # A server that stops when it would listen, and chats that are left.
        stopped = []

        def stop(host, port, generator, **_):
            generator.stop_and_join()
            stopped.append(port)

        monkeypatch.setattr(server, "_run_http_server", stop)
        monkeypatch.setattr(os, "_exit", lambda code: None)
        typed = "q\n" if arguments[0] == "run" else "/exit\n"
        result = CliRunner().invoke(main, arguments, input=typed)
        assert result.exit_code == 0, (result.stderr, result.exception)
        assert result.stdout.strip() or arguments[0] in ("chat", "serve")
        assert "Traceback" not in result.stderr
        assert bool(stopped) == (arguments[0] == "serve")
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


def test_there_are_programs_and_commands():
    assert {"README.md", "docs/guide.md"} <= set(map(name_of, PROGRAMS))
    assert len(COMMANDS) >= 10


def test_what_fewer_bits_are_said_to_cost_is_what_the_rows_say():
    found = {}
    for path in (ROOT / "results/bits").glob("*/results.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "kv_bits" in row and row["max_kv_size"] is not None:
                change = 100 * (row["ratio_to_plain"] - 1)
                found.setdefault(tuple(row["kv_bits"]), []).append(change)
    for bits, (least, most) in CHANGES.items():
        changes = found[BEST[bits]]
        # Two models, two novels, two policies.
        assert len(changes) == 8
        assert (least, most) == (round(min(changes), 1), round(max(changes), 1))
