"""A storage format is one file: one with two arrays does all that ours does."""

import json

import mlx.core as mx
import mxfp4
import pytest
import tiny
from test_cache import CASES
from test_packed import assert_as_good

from tova_mlx import (
    convert,
    describe,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from tova_mlx.caches.batch import BatchPolicyKVCache
from tova_mlx.errors import CacheStateError, OptionError
from tova_mlx.storage import formats
from tova_mlx.storage.formats import Storage, storage_for

LIMIT = 12
BITS = ["mxfp4", ("mxfp4", 8), (4, "mxfp4")]


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(formats, "FORMATS", [*formats.FORMATS, mxfp4.Mxfp4])


@pytest.fixture(scope="module")
def model():
    return tiny.make(n_heads=4, n_kv_heads=2, head_dim=32)


def options_of(policy="tova", bits="mxfp4", **options):
    return {"policy": policy, "kv_bits": bits, "kv_group_size": 32, **options}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("policy", "options"), CASES)
def test_it_is_read_as_if_unpacked(model, policy, options, bits, monkeypatch):
    options = options_of(policy, bits, **options)
    tokens, sizes = tiny.tokens(60), [30, 1, 1, 1, 9, *[1] * 18]
    caches = make_prompt_cache(model, LIMIT, **options)
    got = tiny.feed(model, tokens, caches, sizes)
    two = [c.keys if bits != BITS[2] else c.values for c in caches]
    assert all(isinstance(entries, mxfp4.Mxfp4Entries) for entries in two)
    stored = Storage.store

    def unpacked(self, keys, values):
        return tuple(e.dequantized() for e in stored(self, keys, values))

    monkeypatch.setattr(Storage, "store", unpacked)
    plain = make_prompt_cache(model, LIMIT, **options)
    want = tiny.feed(model, tokens, plain, sizes)
    assert_as_good(got, want)
    for a, b in zip(caches, plain, strict=True):
        assert mx.array_equal(a.positions, b.positions)


@pytest.mark.parametrize("policy", ["tova", "fade", "streaming", "keydiff"])
def test_it_is_saved_trimmed_and_batched(model, policy, tmp_path):
    path = tmp_path / "prompt.safetensors"
    convert(model, LIMIT, **options_of(policy, ("mxfp4", 8)))
    caches = model.make_cache()
    tokens = tiny.tokens(40)
    first = tiny.feed(model, tokens, caches, [25, *[1] * 15])
    assert all(c.trim(5) == 5 for c in caches)
    again = tiny.feed(model, tokens[:, -5:], caches, 1)
    assert_as_good(again, first[:, -5:])

    save_prompt_cache(path, caches, model=model)
    loaded, _ = load_prompt_cache(path, model=model)
    # Copies of the pair are two rows of a batch.
    rows = [BatchPolicyKVCache.merge([c, c]) for c in loaded]
    more = tiny.tokens(20, seed=3)
    want = tiny.feed(model, more, caches, 1)
    assert mx.array_equal(tiny.feed(model, more, loaded, 1), want)
    both = tiny.feed(model, mx.concatenate([more, more]), rows, 1)
    assert_as_good(both[1:], want)

    convert(model, LIMIT, **options_of(policy, (8, "mxfp4")))
    with pytest.raises(CacheStateError, match="Use the options it was saved with"):
        load_prompt_cache(path, model=model)


def test_its_bytes_are_counted_and_its_name_is_said(model):
    caches = make_prompt_cache(model, 64, **options_of(journal=0))
    tiny.feed(model, tiny.tokens(100), caches, [50, *[1] * 50])
    totals = describe(caches).totals
    assert totals["bytes_now"] == totals["bytes_at_most"]
    # Two KV heads of 32, keys and values: 16 bytes of codes, a scale of one.
    entries = 65 * 2 * 2 * (16 + 1)
    # Beside them 65 positions and the victim.
    assert all(c.nbytes - entries == 66 * 4 for c in caches)
    assert "kv_bits=('mxfp4', 'mxfp4')" in caches[0].options.describe()
    plain = make_prompt_cache(model, 64)
    tiny.feed(model, tiny.tokens(30), plain, 30)
    packed = [c.to_quantized(bits="mxfp4") for c in plain]
    assert all(isinstance(c.keys, mxfp4.Mxfp4Entries) for c in packed)


@pytest.mark.parametrize("bits", [None, 4, 8, (8, 4), ("5h", "4h"), *BITS])
def test_storage_is_what_its_json_says(bits):
    stored = storage_for(bits, 32)
    assert Storage.from_json(json.loads(json.dumps(stored.as_json()))) == stored
    if bits is not None:
        assert storage_for(**{**stored.options()}) == stored


def test_what_is_not_a_choice_is_refused_with_those_that_are():
    with pytest.raises(OptionError, match=r"or a pair of 4, 5.*8h, mxfp4 for"):
        storage_for("fp4", 32)
    for wrong in ([8.0, 8, 64], [8, 3, 64], ["8", "8", 64], [True, True, 64]):
        with pytest.raises(OptionError, match="Use 4, 5"):
            Storage.from_json(wrong)
