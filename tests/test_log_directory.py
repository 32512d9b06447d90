"""The directory of logs is one cache's alone, and no file of others is touched."""

import errno
import fcntl
import gc
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from test_row_log import PARTS, assert_holds, made

from tova_mlx.errors import CacheStateError, OptionError
from tova_mlx.storage.log_directory import LogDirectory
from tova_mlx.storage.row_log import MAGIC


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
    refused(lambda: with_logs.log("a", PARTS), "is closed")
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


def refused(what, match):
    """Check the refusal of a path, or of what is called."""
    with pytest.raises(OptionError, match=match) as caught:
        what() if callable(what) else LogDirectory(what)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("archive=")


def test_a_name_that_is_in_use_is_refused_and_its_log_stays(tmp_path):
    with_logs = LogDirectory(tmp_path / "logs")
    log = with_logs.log("a", PARTS)
    log.append(made(range(200)))
    # The second of these parts is there; the first must not be left.
    parts = {"new": PARTS["keys"], "values": PARTS["values"]}
    refused(lambda: with_logs.log("a", parts), "File exists")
    assert len(os.listdir(tmp_path / "logs")) == 1 + len(PARTS)
    assert_holds(log, 0, 200)
    with_logs.close()


def test_foreign_files_are_refused_and_stay(tmp_path):
    for name in ("notes", "a.keys.rows", "lock", "kept.json"):
        path = tmp_path / f"with-{name}"
        path.mkdir()
        (path / name).write_text("mine, and nobody else's")
        refused(path, "is not of an archive")
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


def test_an_empty_lock_of_others_is_used_and_stays(tmp_path):
    (tmp_path / "lock").touch()
    with_logs = LogDirectory(tmp_path)
    refused(tmp_path, "in use")
    with_logs.close()
    assert [f.name for f in tmp_path.iterdir()] == ["lock"]
    assert (tmp_path / "lock").read_bytes() == b""


def test_what_a_killed_run_left_stays_while_there_are_files_of_others(tmp_path):
    (tmp_path / "lock").write_bytes(MAGIC)
    (tmp_path / "a.keys.rows").write_bytes(MAGIC[:3])
    (tmp_path / "a.values.rows").write_text("mine")
    refused(tmp_path, "is not of an archive")
    assert len(os.listdir(tmp_path)) == 3
    (tmp_path / "a.values.rows").unlink()
    LogDirectory(tmp_path).close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("left", [b"", MAGIC[:3], MAGIC])
def test_a_kill_at_any_step_of_the_beginning_leaves_what_can_be_used(tmp_path, left):
    # Of the lock and of a log's first file, a kill leaves any part.
    (tmp_path / "lock").write_bytes(left)
    for head in (b"", MAGIC[:5]):
        (tmp_path / "a.keys.rows").write_bytes(head)
        LogDirectory(tmp_path).close()
        assert os.listdir(tmp_path) == ([] if left else ["lock"])
        (tmp_path / "lock").write_bytes(left)


def test_a_lock_deleted_while_it_was_opened_is_not_one(tmp_path, monkeypatch):
    # Who held it closes in between; a third could lock the next file of that name.
    flock = fcntl.flock

    def late(fd, how):
        (tmp_path / "lock").unlink()
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    refused(tmp_path, "in use")
    # No lock was made in place of the one that was deleted, and no log.
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_used_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    refused(tmp_path / "file", "Not a directory|File exists")
    refused(tmp_path / "file" / "logs", "Not a directory|File exists")
    refused(tmp_path / "a\0b", "null")

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


def test_what_macos_puts_everywhere_is_left_there(tmp_path):
    (tmp_path / ".DS_Store").write_text("of the Finder")
    LogDirectory(tmp_path).close()
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
        logs = LogDirectory(sys.argv[1])
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
    process.kill()
    process.communicate()
    (tmp_path / "logs" / "b.keys.rows").touch()
    assert (tmp_path / "logs" / "a.keys.rows").stat().st_size > 1000
    with_logs = LogDirectory(tmp_path / "logs")
    assert [f.name for f in with_logs.path.iterdir()] == ["lock"]
    refused(tmp_path / "logs", "in use")
    log = with_logs.log("a", PARTS)
    log.append(made(range(100)))
    assert_holds(log, 0, 100)
    with_logs.close()
    assert [*(tmp_path / "logs").iterdir()] == []


def test_a_process_that_ends_closes_and_its_fork_does_not(tmp_path):
    code = """
        logs = LogDirectory(sys.argv[1])
        log = logs.log("a", PARTS)
        log.append(made(range(100)))
        child = os.fork()
        if not child:
            sys.exit()
        os.waitpid(child, 0)
        print(os.path.exists(sys.argv[1] + "/a.keys.rows"))
    """
    assert finished(python(code, tmp_path / "logs")) == "True\n"
    assert not (tmp_path / "logs").exists()
