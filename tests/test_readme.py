import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_quality_table_is_that_of_the_results():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "quality_table.py")],
        capture_output=True,
        text=True,
        check=True,
    )
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = readme.split("<!-- quality -->")[1].split("<!-- /quality -->")[0]
    assert block.strip() == done.stdout.strip()
    assert "fade" in block
