"""What is measured on a Mac becomes a page of Markdown, whatever of it is there."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tova_mlx.cli import main

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import mac_table  # noqa: E402

MADE = {
    "versions": {"tova_mlx": "0.1.0", "mlx": "0.32.4"},
    "device": "Device(gpu, 0) arm64 Darwin",
    "date": "2026-11-26",
}
METAL = {"device_name": "Apple M1 (Virtual)", "memory_size": 7 * 2**30}


@pytest.fixture
def folder(tmp_path):
    step = {"what": "step", "policy": "tova", "max_kv_size": 512}
    times = [
        {**step, "portable_ms": 0.25, "metal_ms": 0.0125},
        {**step, "what": "scan", "portable_ms": 1234.5, "metal_ms": None},
    ]
    report = {**MADE, "metal": METAL, "times": times}
    (tmp_path / "kernels.json").write_text(f"{json.dumps(report)}\n")
    row = {"policy": "tova", "kv_bits": None, "launches": 2.0, "by": {"step": 1}}
    rows = [row, {**row, "kv_bits": 4, "launches": 7.5, "real_us": 21.456}]
    (tmp_path / "dispatches.json").write_text(json.dumps({**MADE, "rows": rows}))
    (tmp_path / "bench").mkdir()
    shutil.copy(ROOT / "results/bench/results.jsonl", tmp_path / "bench")
    return tmp_path


def test_a_kernel_beside_the_portable_form(folder):
    page = mac_table.markdown(folder)
    assert "| step | tova | 512 | 0.25 | 0.0125 | 20 |" in page
    assert "| scan | tova | 512 | 1,234 |  |  |" in page
    assert "Apple M1 (Virtual), 7 GiB, tova_mlx 0.1.0, mlx 0.32.4, 2026-11-26" in page


def test_launches_with_whatever_figures_there_are(folder):
    page = mac_table.markdown(folder)
    assert "| policy | kv_bits | launches | real_us |" in page
    assert "| tova |  | 2 |  |" in page
    assert "| tova | 4 | 7.5 | 21.5 |" in page
    assert "Device(gpu, 0) arm64 Darwin, tova_mlx 0.1.0" in page


def test_a_line_per_cache_and_context(folder):
    page = mac_table.markdown(folder)
    rows = (folder / "bench/results.jsonl").read_text().splitlines()
    rows = [json.loads(row) for row in rows]
    cases = {(r["policy"], r["max_kv_size"], r["context"]) for r in rows}
    part = page.partition("### tova-mlx bench")[2]
    assert part.count("\n| ") == 2 + len(cases)
    speed = next(r["value"] for r in rows if r["unit"] == "prefill_tps")
    first = f"| {rows[0]['policy']} | {rows[0]['context']:,} | {speed:.3g} | "
    assert first in part
    assert "| tova 512 | 16,384 | " in part
    assert "Bound: the bytes that a step has to read" in part


def test_every_line_of_a_table_has_as_many_cells(folder):
    for part in mac_table.markdown(folder).split("###")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) == 1


def test_the_workflow_leaves_what_is_read_here():
    text = (ROOT / ".github/workflows/mac.yml").read_text(encoding="utf-8")
    (command,) = re.findall(r"tova-mlx (bench .*)", text)
    given = main.commands["bench"].make_context("bench", shlex.split(command)[1:])
    written = {str(given.params["out"] / "results.jsonl")}
    written |= set(re.findall(r"--out (mac/\S+\.json)", text))
    assert written == {f"mac/{name}" for _, name, _ in mac_table.PARTS}
    assert "scripts/mac_table.py mac " in text


def test_what_was_not_measured_is_said(tmp_path):
    (tmp_path / "kernels.json").write_text("")
    page = mac_table.markdown(tmp_path)
    names = "kernels.json", "dispatches.json", "bench/results.jsonl"
    assert [line for line in page.splitlines() if "Not" in line] == [
        f"Not measured: there is no {name}." for name in names
    ]
