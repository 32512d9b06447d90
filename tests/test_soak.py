"""scripts/soak.py in short: nothing grows past the end of a model's range."""

import sys
from pathlib import Path

import pytest
import tiny

from tova_mlx import make_prompt_cache

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import soak


@pytest.mark.parametrize("policy", ["tova", "fade", "streaming"])
@pytest.mark.parametrize("kv_bits", [None, 8])
def test_nothing_drifts(policy, kv_bits, monkeypatch):
    monkeypatch.setattr(soak, "READ", 300)
    monkeypatch.setattr(soak, "STEP", 100)
    monkeypatch.setattr(soak, "DECODED", 20)
    model = tiny.make(n_heads=4, n_kv_heads=2, head_dim=32)
    model.args.max_position_embeddings = 1024
    how = {"positions": "auto", "kv_bits": kv_bits, "kv_group_size": 32, "journal": 0}
    caches = make_prompt_cache(model, 64, policy=policy, **how)
    ids = tiny.tokens(600)[0].tolist()
    rows = []
    for n in range(16):
        start = n % 2 * 300
        row = soak.stretch(model, ids[start : start + 300], caches)
        rows.append({"tokens": (n + 1) * 320, **row})
    assert caches[0].seen == 16 * 320
    assert caches[0].offset <= 64 + 256
    found = soak.drift(rows, 4)
    assert len(found["cache_bytes"]) == 1
    # Arrays of so small a model come and go by chance; more and more must not stay.
    peaks, active = ([r[k] for r in rows] for k in ("peak_bytes", "active_bytes"))
    assert max(peaks[8:]) < 1.3 * max(peaks[:8])
    assert active[-1] - active[4] < 50_000
    # Other tests' memory is in it too; the script itself asks for 1 MB per 10,000.
    assert found["resident_bytes_per_10k_tokens"] < 50e6
    assert len(caches[0].slots.journal.arrays) == 0


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("cache_bytes", lambda i, r: {"cache_bytes": r["cache_bytes"] + (i == 19)}),
        ("peak_bytes_change", lambda i, r: {"peak_bytes": 100 + (i == 19) * 2}),
        (
            "resident_bytes_per_10k_tokens",
            lambda i, r: {"resident_bytes": 300_000 * i},
        ),
        ("speed_last_tenth_to_first", lambda i, r: {"tokens_per_s": 10 - i / 15}),
        ("perplexity_to_first_lap", lambda i, r: {"perplexity": 9.0 + (i == 19)}),
    ],
)
def test_what_drifts_is_found(name, change):
    row = {
        "cache_bytes": 1000,
        "peak_bytes": 100,
        "resident_bytes": 7,
        "tokens_per_s": 10.0,
        "perplexity": 9.0,
    }
    rows = [{**row, "tokens": 2048 * i} for i in range(20)]
    assert soak.wrong(soak.drift(rows, 4)) == []
    drifting = [{**r, **change(i, r)} for i, r in enumerate(rows)]
    assert soak.wrong(soak.drift(drifting, 4)) == [name]
