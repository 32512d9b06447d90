"""A file is written whole or not at all, and what killed runs left goes."""

import fcntl
import os

import pytest

from tova_mlx.files import working_directory, written_whole


def fail_after_half(written):
    written.write_text("half")
    raise OSError("disk full")


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(OSError, match="disk"), written_whole(path) as written:
        fail_after_half(written)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with written_whole(path) as written:
        written.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a" * 255, "a." + "b" * 253, ".hidden", "x y.tar.gz"])
def test_any_name_that_a_file_can_have_will_do(name, tmp_path):
    with written_whole(tmp_path / name) as written:
        written.write_text("new")
    assert os.listdir(tmp_path) == [name]


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("fsync"), fsync(fd)))
    monkeypatch.setattr(
        os, "replace", lambda *pair: (done.append("replace"), replace(*pair))
    )
    with written_whole(tmp_path / "a") as written:
        written.write_text("new")
    assert done == ["fsync", "replace", "fsync"]


def test_what_killed_runs_left_is_deleted_and_what_runs_is_not(tmp_path):
    with working_directory(tmp_path) as own, working_directory(tmp_path) as other:
        (own / "half").write_text("half")
        (tmp_path / ".tova_mlx-killed" / "within").mkdir(parents=True)
        (tmp_path / ".tova_mlx-killed" / "half").write_text("half")
        (tmp_path / ".tova_mlx-file").write_text("of others")
        (tmp_path / ".tova_mlx-link").symlink_to(tmp_path / ".tova_mlx-killed")
        with working_directory(tmp_path):
            pass
        assert (own / "half").exists()
        assert other.exists()
    left = {".tova_mlx-file", ".tova_mlx-link"}
    assert set(os.listdir(tmp_path)) == left


def test_a_directory_deleted_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    flock, deleted = fcntl.flock, []

    def late(fd, how):
        if not deleted:
            (place,) = tmp_path.iterdir()
            place.rmdir()
            deleted.append(place)
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with working_directory(tmp_path) as place:
        assert place.is_dir()
        assert place not in deleted
    assert list(tmp_path.iterdir()) == []


def test_without_locks_a_file_is_written_and_nothing_is_deleted(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "no locks here")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    (tmp_path / ".tova_mlx-other").mkdir()
    with written_whole(tmp_path / "a") as written:
        written.write_text("new")
    assert set(os.listdir(tmp_path)) == {"a", ".tova_mlx-other"}
