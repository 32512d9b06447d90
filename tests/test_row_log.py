"""The log on disk gives back what was appended, or says that it cannot."""

import errno
import os
import shutil
import sys
import tempfile
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from tova_mlx.errors import CacheStateError
from tova_mlx.storage.log_directory import LogDirectory
from tova_mlx.storage.row_log import BLOCK, MAGIC

PARTS = {
    "keys": (np.float16, (3, 8)),
    "values": (np.uint32, (5,)),
    "positions": (np.int32, ()),
}
# Of a row of all parts: 48 + 20 + 4.
ROW_BYTES = 72
SMALL = {"keys": (np.float16, (3,)), "positions": (np.int32, ())}


def made(numbers, salt=0, parts=PARTS):
    """Rows that say which they are: every element differs by row, place and salt."""
    numbers = np.asarray(numbers, np.int64).reshape(-1)
    rows = {}
    for i, (name, (dtype, shape)) in enumerate(parts.items()):
        size = int(np.prod(shape))
        each = numbers[:, None] * 31 + np.arange(size) * 7 + i + 1009 * salt
        each = each % 2039 if dtype is np.float16 else each * 40503
        rows[name] = each.astype(dtype).reshape(len(numbers), *shape)
    return rows


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype
        np.testing.assert_array_equal(got[name], want[name])


def assert_holds(log, first, count, salt=0, parts=PARTS):
    assert (log.first, log.count) == (first, count)
    numbers = np.random.default_rng(0).permutation(np.arange(first, count))
    assert_same(log.take(numbers), made(numbers, salt, parts))
    for wrong in (first - 1, count, -1):
        with pytest.raises(IndexError):
            log.take([wrong])


def blocks_bytes(blocks, row_bytes=ROW_BYTES, parts=3):
    return parts * len(MAGIC) + blocks * (row_bytes * BLOCK + 4 * parts)


def test_rows_whose_place_the_next_block_takes_are_not_held(tmp_path):
    directory = LogDirectory(tmp_path / "logs")
    log = directory.log("a", PARTS, 2 * BLOCK)
    log.append(made(range(2 * BLOCK)))
    assert log.first == 0
    log.append(made(range(2 * BLOCK, 2 * BLOCK + 1)))
    assert log.first == BLOCK
    with pytest.raises(IndexError):
        log.take([BLOCK - 1])


class Sequences(RuleBasedStateMachine):
    """Against a list of (number, salt), one per row, and the oldest that is held."""

    @initialize(limit=st.sampled_from([None, 1, 128, 150, 320]))
    def start(self, limit):
        self.place = Path(tempfile.mkdtemp())
        self.limit, self.places = limit, limit and max(2, limit // BLOCK)
        self.directory = LogDirectory(self.place / "new" / "logs")
        self.log = self.directory.log("layer-0", PARTS, limit)
        self.rows, self.first, self.salt, self.most = [], 0, 0, 0

    @rule(n=st.one_of(st.integers(0, 5), st.integers(50, 330)))
    def append(self, n):
        self.salt += 1
        start = len(self.rows)
        self.log.append(made(range(start, start + n), self.salt))
        for number in range(start, start + n):
            self.rows.append((number, self.salt))
            if self.places:
                oldest = (number // BLOCK + 1 - self.places) * BLOCK
                self.first = max(self.first, oldest)
        self.most = max(self.most, self._blocks(len(self.rows) // BLOCK))

    def _blocks(self, blocks):
        return min(blocks, self.places) if self.places else blocks

    @rule(back=st.one_of(st.integers(0, 70), st.integers(0, 700)))
    def truncate(self, back):
        count = max(0, len(self.rows) - back)
        self.log.truncate(count)
        self.rows, self.first = self.rows[:count], min(self.first, count)

    @rule(data=st.data())
    def take(self, data):
        held = range(self.first, len(self.rows))
        if held:
            numbers = data.draw(st.lists(st.sampled_from(held), max_size=20))
            self._compare(numbers)

    @rule()
    def take_all(self):
        self._compare(list(range(self.first, len(self.rows))))

    def _compare(self, numbers):
        got = self.log.take(np.array(numbers, np.uint32))
        for i, number in enumerate(numbers):
            one = made(*self.rows[number])
            assert all(np.array_equal(got[name][i], one[name][0]) for name in one)
        assert {n: a.shape for n, a in got.items()} == {
            n: (len(numbers), *shape) for n, (_, shape) in PARTS.items()
        }

    @invariant()
    def counts(self):
        if not hasattr(self, "log"):
            return
        assert (self.log.count, self.log.first) == (len(self.rows), self.first)
        for wrong in (-1, self.first - 1, len(self.rows)):
            with pytest.raises(IndexError):
                self.log.take([wrong])

    @invariant()
    def bytes_on_disk_are_as_predicted(self):
        if not hasattr(self, "log"):
            return
        sizes = [f.stat().st_size for f in self.directory.path.glob("*.rows")]
        assert sum(sizes) == self.log.nbytes == blocks_bytes(self.most)

    def teardown(self):
        if hasattr(self, "directory"):
            self.directory.close()
            shutil.rmtree(self.place)


TestSequences = Sequences.TestCase
TestSequences.settings = settings(
    max_examples=60, stateful_step_count=20, deadline=None
)


def test_rows_of_another_shape_or_type_are_refused(tmp_path):
    with_logs = LogDirectory(tmp_path / "logs")
    log = with_logs.log("a", PARTS)
    rows = made(range(4))
    for changed in (
        {**rows, "keys": rows["keys"].astype(np.float32)},
        {**rows, "keys": rows["keys"][..., :7]},
        {**rows, "keys": rows["keys"][:3]},
        {"keys": rows["keys"]},
    ):
        with pytest.raises(ValueError, match="expected rows"):
            log.append(changed)
    assert log.count == 0
    with_logs.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_does_not_bring_the_file_into_memory(tmp_path):
    def anonymous():
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) << 10

    with_logs = LogDirectory(tmp_path / "logs")
    log = with_logs.log("a", {"keys": (np.uint16, (1024,))})
    some = np.zeros((4 * BLOCK, 1024), np.uint16)
    for i in range(64):
        some[:, 0] = range(4 * BLOCK * i, 4 * BLOCK * (i + 1))
        log.append({"keys": some})
    before = anonymous()
    numbers = np.arange(0, log.count, BLOCK)
    assert (log.take(numbers)["keys"][:, 0] == numbers).all()
    assert with_logs.nbytes > 32 << 20
    assert anonymous() - before < 8 << 20
    with_logs.close()


def block_bytes(name):
    dtype, shape = SMALL[name]
    return BLOCK * np.dtype(dtype).itemsize * int(np.prod(shape)) + 4


@pytest.mark.parametrize("name", SMALL)
def test_a_bit_flipped_anywhere_in_a_block_is_noticed(tmp_path, name):
    with_logs = LogDirectory(tmp_path / "logs")
    log = with_logs.log("a", SMALL)
    log.append(made(range(3 * BLOCK), parts=SMALL))
    size, file = block_bytes(name), tmp_path / "logs" / f"a.{name}.rows"
    whole = file.read_bytes()
    with open(file, "r+b", buffering=0) as f:
        for i in range(size):
            at = len(MAGIC) + size + i
            os.pwrite(f.fileno(), bytes([whole[at] ^ 1 << i % 8]), at)
            with pytest.raises(CacheStateError, match="block 1 is damaged"):
                log.take([BLOCK + 3])
            os.pwrite(f.fileno(), whole[at : at + 1], at)
    assert_holds(log, 0, 3 * BLOCK, parts=SMALL)
    with_logs.close()


@pytest.mark.parametrize("name", SMALL)
def test_a_last_block_that_is_torn_anywhere_is_an_error(tmp_path, name):
    with_logs = LogDirectory(tmp_path / "logs")
    log = with_logs.log("a", SMALL)
    log.append(made(range(2 * BLOCK + 10), parts=SMALL))
    file = tmp_path / "logs" / f"a.{name}.rows"
    whole = file.read_bytes()
    for length in reversed(range(len(whole) - block_bytes(name), len(whole))):
        os.truncate(file, length)
        with pytest.raises(CacheStateError, match="block 1 is damaged"):
            log.take([0, 2 * BLOCK - 1])
    sound = np.r_[0:BLOCK, 2 * BLOCK : 2 * BLOCK + 10]
    assert_same(log.take(sound), made(sound, parts=SMALL))
    with_logs.close()


def test_a_bit_flipped_in_an_earlier_block_is_an_error_when_it_is_read(tmp_path):
    with_logs = LogDirectory(tmp_path / "logs")
    log = with_logs.log("a", SMALL)
    log.append(made(range(4 * BLOCK), parts=SMALL))
    file = tmp_path / "logs" / "a.keys.rows"
    changed = bytearray(file.read_bytes())
    changed[len(MAGIC) + block_bytes("keys") + 17] ^= 4
    with open(file, "r+b") as f:
        f.write(changed)
    for _ in range(2):
        with pytest.raises(CacheStateError, match=r"a\.keys\.rows: block 1 is damaged"):
            log.take([3, BLOCK + 60])
        with pytest.raises(CacheStateError, match="block 1 is damaged"):
            log.truncate(BLOCK + 5)
    sound = np.r_[0:BLOCK, 2 * BLOCK : 4 * BLOCK]
    assert_same(log.take(sound), made(sound, parts=SMALL))
    assert log.count == 4 * BLOCK
    with_logs.close()


def test_a_block_in_the_place_of_another_is_an_error(tmp_path):
    # Its rows are whole, so only its number says that they are others.
    with_logs = LogDirectory(tmp_path / "logs")
    log = with_logs.log("a", SMALL)
    log.append(made(range(2 * BLOCK), parts=SMALL))
    for name in SMALL:
        size, file = block_bytes(name), tmp_path / "logs" / f"a.{name}.rows"
        with open(file, "r+b") as f:
            f.seek(len(MAGIC))
            first = f.read(size)
            f.write(first)
    with pytest.raises(CacheStateError, match="block 1 is damaged"):
        log.take([BLOCK])
    with_logs.close()


def test_a_file_cut_off_after_it_was_read_is_an_error_not_a_crash(tmp_path):
    with_logs = LogDirectory(tmp_path / "logs")
    log = with_logs.log("a", PARTS)
    log.append(made(range(40 * BLOCK)))
    log.take(np.arange(40 * BLOCK))
    os.truncate(tmp_path / "logs" / "a.keys.rows", 5000)
    with pytest.raises(CacheStateError, match="cut off"):
        log.take([39 * BLOCK])
    assert_same(log.take([3]), made([3]))
    with_logs.close()


def test_a_log_cut_below_its_first_row_is_empty_and_goes_on(tmp_path):
    with_logs = LogDirectory(tmp_path / "logs")
    log = with_logs.log("a", PARTS, 128)
    log.append(made(range(300)))
    assert_holds(log, 3 * BLOCK, 300)
    log.truncate(BLOCK + 6)
    assert_holds(log, BLOCK + 6, BLOCK + 6)
    log.append(made(range(BLOCK + 6, 2 * BLOCK + 9)))
    assert_holds(log, BLOCK + 6, 2 * BLOCK + 9)
    with_logs.close()


def test_a_block_written_again_is_checked_again(tmp_path):
    with_logs = LogDirectory(tmp_path / "logs")
    log = with_logs.log("a", SMALL)
    log.append(made(range(BLOCK), parts=SMALL))
    log.take([3])
    log.truncate(10)
    log.append(made(range(10, BLOCK), parts=SMALL))
    with open(tmp_path / "logs" / "a.keys.rows", "r+b") as file:
        file.seek(len(MAGIC) + 7)
        file.write(b"?")
    with pytest.raises(CacheStateError, match="block 0 is damaged"):
        log.take([3])
    with_logs.close()


class Full:
    """A disk that takes so many bytes more, and writes what fits before it says so."""

    def __init__(self, room, monkeypatch):
        self.room, self.pwrite = room, os.pwrite
        monkeypatch.setattr(os, "pwrite", self)

    def __call__(self, fd, data, offset):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        n = min(len(data), self.room)
        self.room -= n
        return self.pwrite(fd, data[:n], offset)


@pytest.mark.parametrize("limit", [None, 128])
@pytest.mark.parametrize("room", [0, 1, 3075, 3076, 4000, 4356, 4616, 4620, 5000, 9000])
def test_a_full_disk_leaves_what_was_written(tmp_path, monkeypatch, room, limit):
    with_logs = LogDirectory(tmp_path / "logs")
    log = with_logs.log("a", PARTS, limit)
    log.append(made(range(5 * BLOCK)))
    log.append(made(range(5 * BLOCK, 5 * BLOCK + 10)))
    with monkeypatch.context() as patch:
        Full(room, patch)
        with pytest.raises(
            CacheStateError, match=r"No space left.*Make room"
        ) as caught:
            log.append(made(range(5 * BLOCK + 10, 9 * BLOCK)))
    written = room // (BLOCK * ROW_BYTES + 12)
    count = (5 + written) * BLOCK + (0 if written else 10)
    first = 0 if limit is None else log.first
    # A block of which the first row came is not held twice: the ring has two places.
    assert limit is None or count - first in (BLOCK, BLOCK + 10)
    assert_holds(log, first, count)
    with pytest.raises(CacheStateError, match="No space left") as again:
        log.append(made([0]))
    assert str(again.value) == str(caught.value)
    log.truncate(count - 20)
    assert_holds(log, first, count - 20)
    with pytest.raises(CacheStateError, match="No space left"):
        log.append(made([0]))
    assert_holds(log, first, count - 20)
    with_logs.close()
    assert not (tmp_path / "logs").exists()


def test_files_that_others_deleted_are_read_and_written_on(tmp_path):
    with_logs = LogDirectory(tmp_path / "logs")
    log = with_logs.log("a", PARTS)
    log.append(made(range(100)))
    shutil.rmtree(tmp_path / "logs")
    log.append(made(range(100, 200)))
    assert_holds(log, 0, 200)
    with_logs.close()


def test_a_closed_log_leaves_the_others_and_its_name(tmp_path):
    with_logs = LogDirectory(tmp_path / "logs")
    other = with_logs.log("b", PARTS)
    other.append(made(range(200), salt=1))
    names, descriptors = set(os.listdir(with_logs.path)), len(os.listdir("/dev/fd"))
    closed = []
    for salt in range(3):
        log = with_logs.log("a", PARTS)
        log.append(made(range(200), salt))
        assert_holds(log, 0, 200, salt)
        log.close()
        log.close()
        assert log.closed
        assert set(os.listdir(with_logs.path)) == names
        assert len(os.listdir("/dev/fd")) == descriptors
        assert log.nbytes == 0
        assert with_logs.nbytes == other.nbytes
        with pytest.raises(CacheStateError, match="log a is closed"):
            log.append(made([0]))
        with pytest.raises(IndexError):
            log.take([0])
        assert_same(log.take([]), made([]))
        closed.append(weakref.ref(log))
    # The directory does not collect them.
    assert [each() is None for each in closed] == [True, True, False]
    assert_holds(other, 0, 200, salt=1)
    with_logs.close()
    assert not (tmp_path / "logs").exists()
