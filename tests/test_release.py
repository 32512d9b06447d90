"""What a release says of itself agrees, and what is installed is typed."""

import re
from importlib.metadata import requires
from pathlib import Path

import pytest

import tova_mlx

ROOT = Path(__file__).parents[1]
PLACES = {
    "pyproject.toml": r'^version = "(.+)"$',
    "CITATION.cff": r"^version: (.+)$",
    "CHANGELOG.md": r"^## (\S+)",
}


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PLACES)
def test_the_version_is_the_same_everywhere(name):
    first = re.search(PLACES[name], text_of(name), re.MULTILINE)
    assert first[1] == tova_mlx.__version__


def test_the_date_of_the_citation_is_that_of_the_changelog():
    released = re.search(r"^date-released: (.+)$", text_of("CITATION.cff"), re.M)[1]
    assert f"## {tova_mlx.__version__} ({released})" in text_of("CHANGELOG.md")


def test_the_python_that_is_asked_for_is_the_one_that_is_looked_for():
    project = text_of("pyproject.toml")
    wanted = re.search(r'^requires-python = ">=3\.(\d+)"', project, re.MULTILINE)
    assert f"Python ≥ 3.{wanted[1]}" in text_of("README.md")
    setup = text_of("scripts/setup.sh")
    assert f"sys.version_info < (3, {wanted[1]})" in setup
    assert f"Python 3.{wanted[1]} or newer" in setup
    release = text_of(".github/workflows/release.yml")
    assert f'"3.{wanted[1]}"' in release
    named = re.findall(r"Python :: 3\.(\d+)", project)
    assert min(map(int, named)) == int(wanted[1])


def test_mlx_lm_is_held_to_the_minor_version_that_was_tried():
    (wanted,) = (r for r in requires("tova_mlx") if r.startswith("mlx-lm"))
    assert re.search(r"<0\.\d+", wanted)
    assert re.search(r">=0\.\d+\.\d+", wanted)
    low, high = re.search(
        r"`(>=0[^,]+),(<0[^`]+)`", text_of("docs/releasing.md")
    ).groups()
    assert low in wanted
    assert high in wanted


def test_the_package_says_that_it_is_typed():
    assert (Path(tova_mlx.__file__).parent / "py.typed").exists()
