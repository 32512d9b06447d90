"""A file of lines is whole whatever ended the last line, and after a full disk."""

import errno
import json
import os

import pytest

from tova_mlx.errors import EvaluationError
from tova_mlx.evaluation.answers import Answers
from tova_mlx.evaluation.lines import Lines

FIRST, SECOND = {"answer": "Ça va, 世界?"}, {"answer": "naïve café"}


@pytest.fixture
def path(tmp_path):
    """A file of two objects."""
    lines = Lines(tmp_path / "answers.jsonl")
    for values in (FIRST, SECOND):
        lines.add(values, ensure_ascii=False)
    return lines.path


def test_a_line_cut_off_anywhere_is_dropped(path, tmp_path):
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole) - 1):
        # Also within a character of several bytes.
        path.write_bytes(whole[:end])
        lines = Lines(path)
        assert list(lines) == [FIRST]
        lines.add(SECOND, ensure_ascii=False)
        assert path.read_bytes() == whole
    path.write_bytes(whole[:-1])
    assert list(Lines(path)) == [FIRST, SECOND]
    assert path.read_bytes() == whole
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("name", ["fsync", "write"])
def test_a_full_disk_leaves_the_lines_before(path, monkeypatch, name):
    before, lines = path.read_bytes(), Lines(path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if name == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        # Room for less than a line.
        import resource

        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))
        monkeypatch.setattr(os, "fsync", lambda fd: None)
    try:
        with pytest.raises(EvaluationError, match=r"answers.jsonl: cannot be written"):
            lines.add(FIRST)
    finally:
        if name == "write":
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before


def test_answers_that_cannot_be_read_are_one_line(tmp_path):
    (tmp_path / "answers.jsonl").mkdir()
    with pytest.raises(EvaluationError, match=r"answers.jsonl .*\(it is not a file\)"):
        Answers(tmp_path, {})
    (tmp_path / "answers.jsonl").rmdir()
    (tmp_path / "answers.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(EvaluationError, match="that is no answer of an evaluation"):
        Answers(tmp_path, {})
    assert json.dumps(FIRST)
