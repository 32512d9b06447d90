"""The examples run as their first lines say, on a small model."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_serve import serving

ROOT = Path(__file__).parents[1]
EXAMPLES = {file.stem: file for file in (ROOT / "examples").glob("*.py")}
TEXT = str(ROOT / "scripts" / "moby_dick_excerpt.txt")
HELD = re.compile(r"(\d+) tokens seen, (\d+) held(?: per layer)?, ([\d.]+) MiB")
pytestmark = pytest.mark.real_model


def run(name, *arguments):
    done = subprocess.run(
        [sys.executable, EXAMPLES[name], *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here():
    tests = Path(__file__).read_text(encoding="utf-8")
    assert len(EXAMPLES) >= 4
    for name in EXAMPLES:
        assert re.search(rf'run\(\s*\*?\(?"{name}"', tests), name


def test_a_custom_cache(small_path):
    said = run(
        *("custom_cache", "--model", small_path, "--text", TEXT),
        *("--max-kv-size", 64, "--max-tokens", 5),
    )
    ((seen, held, size),) = HELD.findall(said)
    assert int(seen) > 2000
    assert int(held) == 64
    # 32 KiB of keys and values a token.
    assert 2 <= float(size) < 3


def test_a_summary_of_a_long_file(small_path):
    said = run(
        *("summarise", TEXT, "--model", small_path, "--max-kv-size", 128),
        *("--section", 500, "--max-tokens", 4),
    )
    found = HELD.findall(said)
    assert len(found) == 5
    assert int(found[-1][0]) > 2000
    assert {(held, size) for _, held, size in found} == {("128", found[0][2])}


def test_a_client(demo_path):
    with serving("--model", str(demo_path), "--log-level", "ERROR") as (_, client):
        port = client.base_url.port
        said = run(
            *("openai_client", "Name a river.", "Name another.", "--port", port),
            *("--max-tokens", 5),
        )
    (first, _), (second, known) = re.findall(r"\[(\d+) tokens, (\d+) of them", said)
    assert int(second) > int(known) >= int(first) > 10


def test_a_long_chat(small_path):
    said = run(
        *("long_chat", TEXT, "--model", small_path, "--max-kv-size", 128),
        *("--recall", 32, "--passages", 3, "--words", 300),
    )
    archived = [int(n) for n in re.findall(r"(\d+) in the archive", said)]
    assert archived[0] > 1000
    assert archived[1] == 0
    assert "layers read again: " in said.partition("recall=0")[0]
    assert "read again" not in said.partition("recall=0")[2]
