"""What scripts/demo.sh ends with, on the demo model."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.real_model


def test_the_demo_shows_what_a_bounded_cache_saves_and_recall_finds(demo_path):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "demo.py"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # No bar in a pipe.
    assert done.stderr == ""
    row = re.compile(
        r"^(.+?)  +[\d.]+ s +([\d,]+) +([\d.]+) MiB +(–|[\d.]+ MiB)  (.+)$", re.M
    )
    full, bounded, recalled = row.findall(done.stdout)
    assert (full[0], bounded[0], recalled[0]) == (
        "full cache",
        "256 tokens",
        "256, 64 recall",
    )
    assert [full[1], bounded[1], recalled[1]] == ["1,830", "256", "192"]
    assert float(bounded[2]) < float(full[2]) / 6
    assert float(recalled[2]) < float(bounded[2])
    assert [full[4], recalled[4]] == ["48213", "48213"]
    assert bounded[4] != "48213"
    assert done.stdout.count("“Captain Ahab,” said Starbuck, “I’ve") == 3
