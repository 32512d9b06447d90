"""The directory of logs is one cache's alone, and no file of others is touched."""

import errno
import fcntl
import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from test_row_log import (
    PARTS,
    SMALL,
    Full,
    _no_waiting_for_the_disk,  # noqa: F401  (a fixture)
    assert_holds,
    assert_same,
    kept,
    made,
)

from tova_mlx.errors import CacheStateError, OptionError
from tova_mlx.storage.log_directory import LogDirectory
from tova_mlx.storage.row_log import BLOCK


@pytest.mark.parametrize("limit", [None, 150])
@pytest.mark.parametrize("count", [0, 1, BLOCK, 5 * BLOCK - 1, 5 * BLOCK, 400])
def test_kept_rows_open_again_and_go_on(tmp_path, limit, count):
    first = kept(tmp_path / "logs", count, PARTS, limit_rows=limit)
    assert sorted(json.loads((tmp_path / "logs/kept.json").read_text())) == ["a"]
    for salt in range(2):
        with closing(LogDirectory.open(tmp_path / "logs")) as with_logs:
            log = with_logs.log("a", PARTS, limit)
            assert_holds(log, first, count)
            log.append(made(range(count, count + 30), 1 + salt))
            fresh = np.arange(count, count + 30)
            assert_same(log.take(fresh), made(fresh, 1 + salt))
            log.truncate(count)
            first = log.first


def test_a_kept_log_has_the_parts_that_it_was_kept_with(tmp_path):
    kept(tmp_path / "logs", 5)
    with_logs = LogDirectory.open(tmp_path / "logs")
    for parts, limit in ((PARTS, None), (SMALL, 128)):
        with pytest.raises(CacheStateError, match="Use the options"):
            with_logs.log("a", parts, limit)
    with_logs.log("b", PARTS).append(made(range(7)))
    with_logs.close()
    with_logs = LogDirectory.open(tmp_path / "logs", keep=False)
    assert_holds(with_logs.logs["b"], 0, 7)
    with_logs.close()
    assert [*(tmp_path / "logs").iterdir()] == []


def test_rows_are_saved_before_it_is_said_that_they_are_kept(tmp_path, monkeypatch):
    done, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda *a: (done.append("kept"), replace(*a)))
    kept(tmp_path / "logs", 100)
    assert done == ["fsync", "fsync", "fsync", "kept"]


@pytest.mark.parametrize(
    "kept_json",
    [
        "",
        "[]",
        '{"a": 3}',
        json.dumps({"a": {"parts": {"keys": ["<f2", [4]]}}}),
        *(
            json.dumps(
                {name: {"parts": parts, "limit_rows": 0, "first": 0, "count": 5}}
            )
            for name, parts in [
                ("a", {"keys": ["<f2", [4]]}),
                ("a", {"keys": ["|O", [3]]}),
                ("a", {"keys": ["<f2", [-3, -1]], "../k": ["<f2", []]}),
                ("../a", {"keys": ["<f2", [3]]}),
                ("b", {"keys": ["<f2", [3]]}),
            ]
        ),
    ],
)
def test_a_kept_json_of_something_else_is_refused(tmp_path, kept_json):
    kept(tmp_path / "logs", 5)
    (tmp_path / "logs" / "kept.json").write_text(kept_json)
    before = sorted(f.name for f in (tmp_path / "logs").iterdir())
    with pytest.raises(CacheStateError, match="not all that was kept is there"):
        LogDirectory.open(tmp_path / "logs")
    assert sorted(f.name for f in (tmp_path / "logs").iterdir()) == before


def test_closing_deletes_what_was_made_and_no_more(tmp_path):
    with_logs = LogDirectory(tmp_path / "new" / "logs")
    log = with_logs.log("a", PARTS)
    log.append(made(range(200)))
    with_logs.close()
    with_logs.close()
    assert [*tmp_path.rglob("*")] == [tmp_path / "new"]
    with pytest.raises(CacheStateError, match="closed"):
        log.append(made(range(2)))
    with pytest.raises(IndexError):
        log.take([0])
    assert with_logs.nbytes == 0
    # A directory that was there stays, and so does what came later.
    with_logs = LogDirectory(tmp_path / "new")
    with_logs.log("a", PARTS)
    (tmp_path / "new" / "notes").write_text("mine")
    with_logs.close()
    assert [*(tmp_path / "new").iterdir()] == [tmp_path / "new" / "notes"]


def test_a_directory_nobody_has_any_more_closes(tmp_path):
    with_logs = LogDirectory(tmp_path / "logs")
    log = with_logs.log("a", PARTS)
    log.append(made(range(200)))
    del with_logs
    gc.collect()
    assert not (tmp_path / "logs").exists()
    with pytest.raises(CacheStateError, match="Hold its LogDirectory"):
        log.append(made([0]))


def refused(path, match, opener: Callable[..., LogDirectory] = LogDirectory):
    with pytest.raises(OptionError, match=match) as caught:
        opener(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("archive=")


def test_foreign_files_are_refused_and_stay(tmp_path):
    for name in ("notes", "a.keys.rows", "lock", "kept.json.tmp"):
        path = tmp_path / f"with-{name}"
        path.mkdir()
        (path / name).write_text("mine, and nobody else's")
        refused(path, "is not of an archive")
        refused(path, "is not of an archive|nothing that was", LogDirectory.open)
        assert [f.name for f in path.iterdir()] == [name]
        assert (path / name).read_text() == "mine, and nobody else's"
    path = tmp_path / "with-empty"
    path.mkdir()
    (path / "a.keys.rows").touch()
    refused(path, "is not of an archive")
    (path / "a.keys.rows").unlink()
    (path / "a.keys.rows").mkdir()
    refused(path, "is not of an archive")
    assert [f.name for f in path.iterdir()] == ["a.keys.rows"]


def test_kept_rows_are_not_overwritten(tmp_path):
    kept(tmp_path / "logs", 100)
    refused(tmp_path / "logs", "rows that were kept.*LogDirectory.open")
    with_logs = LogDirectory.open(tmp_path / "logs")
    assert_holds(with_logs.logs["a"], 0, 100, parts=SMALL)
    with_logs.close()


def test_a_lock_deleted_while_it_was_opened_is_not_one(tmp_path, monkeypatch):
    # Who held it closes in between; a third could lock the next file of that name.
    flock = fcntl.flock

    def late(fd, how):
        (tmp_path / "lock").unlink()
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    refused(tmp_path, "in use")


def test_places_that_cannot_be_used_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    refused(tmp_path / "file", "Not a directory|File exists")
    refused(tmp_path / "file" / "logs", "Not a directory|File exists")
    refused(tmp_path / "a\0b", "null")
    refused(tmp_path / "none", "No such file", LogDirectory.open)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "nothing that was kept", LogDirectory.open)
    assert [*(tmp_path / "empty").iterdir()] == []

    for number in (errno.EACCES, errno.EROFS, errno.ENOSPC):

        def fail(*_, number=number):
            raise OSError(number, os.strerror(number))

        for name in ("open", "pwrite"):
            with monkeypatch.context() as patch:
                patch.setattr(os, name, fail)
                refused(tmp_path / "logs", os.strerror(number))
            assert not (tmp_path / "logs").exists()
        with_logs = LogDirectory(tmp_path / "logs")
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", fail)
            with pytest.raises(OptionError, match=os.strerror(number)):
                with_logs.log("a", PARTS)
        assert [f.name for f in with_logs.path.iterdir()] == ["lock"]
        with_logs.close()


def test_keeping_on_a_full_disk_says_so_and_keeps_what_it_can(tmp_path, monkeypatch):
    with_logs = LogDirectory(tmp_path / "logs", keep=True)
    logs = [with_logs.log(name, PARTS) for name in "ab"]
    for log in logs:
        log.append(made(range(100)))
    logs[1].truncate(BLOCK)
    with monkeypatch.context() as patch:
        Full(50, patch)
        with pytest.raises(CacheStateError, match="No space left"):
            with_logs.close()
    with_logs = LogDirectory.open(tmp_path / "logs", keep=False)
    for log in with_logs.logs.values():
        assert_holds(log, 0, BLOCK)
    with_logs.close()


def test_a_log_cut_below_its_first_row_is_kept_empty_on_a_full_disk(
    tmp_path, monkeypatch
):
    with_logs = LogDirectory(tmp_path / "logs", keep=True)
    log = with_logs.log("a", PARTS, 128)
    log.append(made(range(300)))
    log.truncate(BLOCK + 6)
    assert_holds(log, BLOCK + 6, BLOCK + 6)
    with monkeypatch.context() as patch:
        Full(0, patch)
        with pytest.raises(CacheStateError, match="No space left"):
            with_logs.close()
    with_logs = LogDirectory.open(tmp_path / "logs", keep=False)
    assert_holds(with_logs.logs["a"], BLOCK, BLOCK)
    with_logs.close()


def test_what_macos_puts_everywhere_is_left_there(tmp_path):
    (tmp_path / ".DS_Store").write_text("of the Finder")
    kept(tmp_path, 5)
    with_logs = LogDirectory.open(tmp_path, keep=False)
    assert_holds(with_logs.logs["a"], 0, 5, parts=SMALL)
    with_logs.close()
    assert [f.name for f in tmp_path.iterdir()] == [".DS_Store"]


def python(code, *args, **options):
    program = "import os, sys, signal\nimport numpy as np\n"
    program += "from test_log_directory import LogDirectory, PARTS, made\n"
    program += textwrap.dedent(code)
    command = [sys.executable, "-c", program, *map(str, args)]
    place = Path(__file__).parent
    return subprocess.Popen(
        command, cwd=place, stdout=subprocess.PIPE, text=True, **options
    )


def finished(process, code=0):
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code
    return out


def test_a_run_killed_while_writing_is_cleared_away_by_the_next(tmp_path):
    code = """
        logs = LogDirectory(sys.argv[1], keep=True)
        log = logs.log("a", PARTS)
        while True:
            log.append(made(range(log.count, log.count + 50)))
            print(log.count, flush=True)
    """
    process = python(code, tmp_path / "logs")
    for _ in range(9):
        assert process.stdout is not None
        process.stdout.readline()
    refused(tmp_path / "logs", "in use by another process")
    refused(tmp_path / "logs", "in use by another process", LogDirectory.open)
    process.kill()
    process.communicate()
    (tmp_path / "logs" / "kept.json.tmp").write_text('{"a": ')
    (tmp_path / "logs" / "b.keys.rows").touch()
    assert (tmp_path / "logs" / "a.keys.rows").stat().st_size > 1000
    refused(tmp_path / "logs", "nothing that was kept", LogDirectory.open)
    with_logs = LogDirectory(tmp_path / "logs")
    assert [f.name for f in with_logs.path.iterdir()] == ["lock"]
    refused(tmp_path / "logs", "in use")
    log = with_logs.log("a", PARTS)
    log.append(made(range(100)))
    assert_holds(log, 0, 100)
    with_logs.close()
    assert [*(tmp_path / "logs").iterdir()] == []


@pytest.mark.parametrize("limit", [None, 256])
def test_a_run_killed_after_opening_leaves_what_was_kept(tmp_path, limit):
    kept(tmp_path / "logs", 300, PARTS, limit_rows=limit)
    code = """
        logs = LogDirectory.open(sys.argv[1])
        log = logs.logs["a"]
        log.truncate(200)
        log.append(made(range(200, 350), salt=5))
        logs.log("b", PARTS)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    finished(python(code, tmp_path / "logs"), -signal.SIGKILL)
    with_logs = LogDirectory.open(tmp_path / "logs", keep=False)
    # Rows that were cut are not found again, nor mixed with those that came instead.
    first = 64 if limit else 0
    assert_holds(with_logs.logs["a"], first, 200)
    assert [*with_logs.logs] == ["a"]
    with_logs.close()


@pytest.mark.parametrize("keep", [False, True])
def test_a_process_that_ends_closes_and_its_fork_does_not(tmp_path, keep):
    code = """
        logs = LogDirectory(sys.argv[1], keep=sys.argv[2] == "True")
        log = logs.log("a", PARTS)
        log.append(made(range(100)))
        child = os.fork()
        if not child:
            sys.exit()
        os.waitpid(child, 0)
        print(os.path.exists(sys.argv[1] + "/a.keys.rows"))
    """
    assert finished(python(code, tmp_path / "logs", keep)) == "True\n"
    if keep:
        with_logs = LogDirectory.open(tmp_path / "logs", keep=False)
        assert_holds(with_logs.logs["a"], 0, 100)
        with_logs.close()
    else:
        assert not (tmp_path / "logs").exists()
