"""What recalling costs as an archive grows, in memory and on disk.

    python scripts/bench_recall.py [--tokens 102400] [--out results/recall/cost.json]

Two parts. One layer of one head reads random tokens under `streaming` with an archive
on disk: its bytes in memory, MLX's, and those on disk, at every tenth of the text. Then
archives of several lengths with the shapes of the demo model's layers, in the 4-bit
class: medians of attending to them, times 30 layers, for one token and for one of the
64 of a part of a prompt. The last line is JSON.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from common import finish, provenance

from tova_mlx import PolicyKVCache
from tova_mlx.attention.recalled import recall
from tova_mlx.storage.archive import Archive, Rows
from tova_mlx.storage.disk_archive import Disk, DiskArchive
from tova_mlx.storage.formats import storage_for
from tova_mlx.storage.log_directory import LogDirectory

N_HEADS, N_KV_HEADS, WIDTH, LAYERS = 9, 3, 64, 30
SLOTS, CHUNK = 64, 512
LENGTHS = (1024, 4096, 16384, 65536, 102400)


def constant(tokens: int, place: Path) -> list[dict[str, int]]:
    """Bytes at every tenth of a text that one layer reads."""
    cache = PolicyKVCache(256, "streaming", recall=SLOTS, journal=0)
    cache.archive_on(Disk(LogDirectory(place / "archive"), "layer"))
    rows = []
    for seen in range(CHUNK, tokens + 1, CHUNK):
        queries, keys, values = (mx.random.normal((1, 1, CHUNK, WIDTH)) for _ in "qkv")
        mask = cache.make_mask(CHUNK)
        held = cache.update_and_fetch(keys, values)
        mx.eval(cache.attend(queries, *held, scale=0.125, mask=mask), cache.state)
        if seen % (tokens // 10) < CHUNK:
            del queries, keys, values, held, mask
            mx.clear_cache()
            rows.append(
                {
                    "tokens": seen,
                    "layer_bytes": cache.nbytes,
                    "active_bytes": mx.get_active_memory(),
                    "disk_bytes": cache.archive_nbytes,
                }
            )
            print(rows[-1], flush=True)
    return rows


def milliseconds(archive: Any, length: int, repeats: int) -> float:
    """A token's share of attending to an archive, for `length` of them."""
    times = []
    shape = (1, N_HEADS, length, WIDTH)
    for _ in range(repeats + 1):
        queries = mx.random.normal(shape)
        mx.eval(queries)
        start = time.perf_counter()
        recalled = recall(queries, archive)
        assert recalled is not None
        mx.eval(*recalled)
        times.append(time.perf_counter() - start)
    return 1000 * LAYERS * statistics.median(times[1:]) / length


def costs(tokens: int, place: Path) -> list[dict[str, Any]]:
    """Milliseconds a token and bytes at several lengths."""
    storage = storage_for(4, 64)
    disk = Disk(LogDirectory(place / "costs"), "layer")
    archives: dict[str, Any] = {
        "memory": Archive(storage),
        "disk": DiskArchive(storage, disk),
    }
    rows, seen = [], 0
    for length in [n for n in LENGTHS if n <= tokens]:
        while seen < length:
            shape = (1, N_KV_HEADS, 1024, WIDTH)
            some = Rows(
                mx.random.normal(shape),
                mx.random.normal(shape),
                mx.arange(seen, seen + 1024, dtype=mx.int32)[None, None],
            )
            seen += 1024
            for name, archive in archives.items():
                archives[name] = archive.add(some).synced()
                mx.eval(archives[name].arrays)
        row: dict[str, Any] = {"tokens": length}
        for name, archive in archives.items():
            row[f"ms_a_token_decoded_{name}"] = milliseconds(archive, 1, 9)
            row[f"ms_a_token_read_{name}"] = milliseconds(archive, CHUNK, 3)
            row[f"bytes_a_token_{name}"] = archive.nbytes / length
        row["predicted_bytes_a_token_disk"] = predicted()
        rows.append(row)
        print(row, flush=True)
    return rows


def predicted() -> float:
    """Bytes of a token on disk: keys of 6 bits, values of 4, scales, its position."""
    numbers = N_KV_HEADS * WIDTH
    scales = 2 * 2 * N_KV_HEADS * (WIDTH // 64)
    return numbers * 6 // 8 + numbers * 4 // 8 + 2 * scales + 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=102400)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    mx.random.seed(0)
    with tempfile.TemporaryDirectory() as place:
        report = {
            **provenance(),
            "layers": LAYERS,
            "recall": SLOTS,
            "costs": costs(args.tokens, Path(place)),
            "constant": constant(args.tokens, Path(place)),
        }
    finish(report, args.out)


if __name__ == "__main__":
    main()
