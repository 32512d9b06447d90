"""Rows that were evicted and come back: by hand, by an oracle, and in a real model."""

import copy
import errno
import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import oracle
import pytest
import reference
import tiny
import zoo
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import cache as mlx_lm_cache

from tova_mlx import (
    POLICIES,
    PolicyKVCache,
    convert,
    describe,
    load_prompt_cache,
    make_prompt_cache,
    revert,
    save_prompt_cache,
)
from tova_mlx.attention import recalled
from tova_mlx.caches.options import CacheOptions
from tova_mlx.errors import CacheStateError, OptionError, UnsupportedModelError
from tova_mlx.storage.archive import Archive, Rows
from tova_mlx.storage.disk_archive import Disk
from tova_mlx.storage.formats import PLAIN
from tova_mlx.storage.log_directory import LogDirectory

BOUNDED = [p for p in POLICIES if POLICIES[p].bounded]
LIMIT, SLOTS, LENGTH = 20, 32, 420
SCALE = 0.35


def new_cache(policy="tova", journal=0, **options):
    """A cache of one layer that archives rows as they come."""
    made = CacheOptions.resolve(
        LIMIT + SLOTS, policy, journal=journal, recall=SLOTS, **options
    )
    made.__dict__["archived"] = PLAIN
    return PolicyKVCache.of(made)


def random_layer(seed, n_heads, n_kv_heads, dim=8):
    """Keys that drift, so that neighbours are alike, and spiky queries."""
    rng = np.random.default_rng(seed)
    drift = np.repeat(rng.normal(size=(n_kv_heads, LENGTH // 10, dim)), 10, axis=1)
    keys = drift + 0.5 * rng.normal(size=(n_kv_heads, LENGTH, dim))
    queries = 3 * rng.normal(size=(n_heads, LENGTH, dim))
    values = rng.normal(size=(n_kv_heads, LENGTH, dim + 2))
    return queries, keys, values


def expected(queries, keys, values, rule):
    """Outputs [n_heads, T, D] and windows {t: sets of positions by KV head}.

    Token by token in float64, with sets of positions and no arrays of windows. What a
    policy holds does not depend on what is recalled.
    """
    n_heads, n_kv_heads = len(queries), len(keys)
    group = n_heads // n_kv_heads
    layer = oracle.Layer(rule.as_dict(), n_heads, n_kv_heads, SCALE)
    evicted = [{} for _ in range(n_kv_heads)]
    windows = {}
    outputs = np.zeros((n_heads, LENGTH, values.shape[2]))
    for t in range(LENGTH):
        norm = np.linalg.norm(values[:, t], axis=1)
        token = oracle.Token(t, keys[:, t], values[:, t], norm)
        # What was evicted before this token, and is not held.
        last_cut = t // SLOTS * SLOTS
        archived = [
            [p for p, step in rows.items() if step < last_cut - 1] for rows in evicted
        ]
        (step,) = layer.read([queries[:, t]], [token], lambda q, k: 0.0)
        for kv in range(n_kv_heads):
            c = kv if len(step.seen) > 1 else 0
            for p in set(step.seen[c]) - set(layer.positions()[c]):
                evicted[kv][p] = t
        # As the full cache, whatever is held.
        for h in range(n_heads):
            logits = keys[h // group, : t + 1] @ queries[h, t] * SCALE
            weights = reference.softmax(logits)
            outputs[h, t] = weights @ values[h // group, : t + 1]
        windows[t] = [
            set().union(
                *by_attention(
                    rows, keys[kv], queries[kv * group : kv * group + group, t]
                )[: SLOTS // 16]
            )
            for kv, rows in enumerate(archived)
        ]
    return outputs, windows


def by_attention(archived, keys, queries):
    """Positions by block, those first that the queries [G, D] attend to most."""
    blocks = {}
    for p in sorted(archived):
        blocks.setdefault(p // 16, set()).add(p)
    scores = [(keys[sorted(ps)] @ queries.T).max() for ps in blocks.values()]
    order = np.argsort(scores)[::-1]
    return [list(blocks.values())[i] for i in order]


def feed(cache, arrays, sizes, start=0):
    """Outputs [n_heads, n, D] of tokens from `start` on, in chunks of these sizes."""
    outputs = []
    for size in sizes:
        q, k, v = (
            mx.array(a[None, :, start : start + size].astype(np.float32))
            for a in arrays
        )
        mask = cache.make_mask(size)
        given = cache.update_and_fetch(k, v)
        outputs.append(np.array(cache.attend(q, *given, scale=SCALE, mask=mask)[0]))
        start += size
    return np.concatenate(outputs, axis=1)


def window(cache):
    """Positions in the window by KV head."""
    asked, archive = cache.slots.recall.asked, cache.slots.recall.archive
    read = recalled.attended_most(asked.queries, archive, asked.archived, SLOTS)
    if read is None:
        return [set() for _ in range(cache.keys.shape[1])]
    found = [{int(p) for p in head if p >= 0} for head in read[0, :, 0]]
    assert set(cache.recalled_positions) == set().union(*found)
    return found


@pytest.mark.parametrize(
    ("policy", "options"),
    [(p, {}) for p in BOUNDED]
    + [("tova", {"granularity": "head"}), ("fade", {"granularity": "layer"})],
)
@pytest.mark.parametrize("heads", [(6, 2), (4, 4)])
def test_it_is_token_by_token_whatever_the_chunks(policy, options, heads):
    arrays = random_layer(len(policy), *heads)
    wanted, windows = expected(*arrays, new_cache(policy, **options).rule)
    sizes = ([LENGTH], [1] * LENGTH, [100, 1, 27, 128, 1, 1, 40, 122])
    for chunks in sizes:
        cache = new_cache(policy, **options)
        start, outputs = 0, []
        for size in chunks:
            outputs.append(feed(cache, arrays, [size], start))
            start += size
            assert window(cache) == windows[start - 1]
        assert np.abs(np.concatenate(outputs, axis=1) - wanted).max() < 1e-4


@pytest.mark.parametrize("policy", ["tova", "streaming"])
def test_what_a_chunk_archives_it_reads_as_it_is_archived(policy):
    arrays = [a[..., :64] for a in random_layer(4, 4, 2, dim=64)]
    # With few bits, so that what was not rounded would be told apart.
    wanted, *others = (
        feed(PolicyKVCache(LIMIT + SLOTS, policy, recall=SLOTS), arrays, sizes)
        for sizes in ([1] * LENGTH, [LENGTH], [LIMIT + 30, LENGTH - LIMIT - 30])
    )
    for other in others:
        assert np.abs(wanted - other).max() < 1e-4


@pytest.mark.parametrize("policy", ["tova", "streaming"])
def test_more_tokens_than_are_attended_with_at_once_recall(policy):
    queries, keys, values = random_layer(9, 4, 2)
    made = CacheOptions.resolve(LIMIT + 320, policy, journal=0, recall=320)
    made.__dict__["archived"] = PLAIN
    outputs = feed(PolicyKVCache.of(made), (queries, keys, values), [30, 290, 100])
    for h, t in np.ndindex(4, LENGTH):
        rows = slice(0, t + 1)
        weights = reference.softmax(keys[h // 2, rows] @ queries[h, t] * SCALE)
        assert np.abs(weights @ values[h // 2, rows] - outputs[h, t]).max() < 1e-4


def snapshot(cache):
    """All that a recall holds and what of it will be read."""
    known = cache.slots.recall
    waiting = [] if known.waiting is None else [known.waiting.positions]
    if cache.slots.victim is not None:
        # It waits in its slot.
        positions, victim = cache.slots.positions, cache.slots.victim
        waiting.append(mx.take_along_axis(positions, victim, axis=2))
    archive = known.archive
    return {
        "waiting": np.concatenate(waiting, axis=2).tolist(),
        "archived": archive.held and np.array(archive.rows().positions).tolist(),
    }


def assert_same(a, b):
    for name, value in a.items():
        if isinstance(value, np.ndarray):
            assert np.abs(value - b[name]).max() < 1e-6, name
        else:
            assert value == b[name], name


@pytest.mark.parametrize("policy", ["tova", "h2o", "streaming", "keydiff"])
@pytest.mark.parametrize("stepwise", [True, False])
@pytest.mark.parametrize("back", [1, 5, 8, 16])
def test_taking_tokens_back_takes_back_what_was_recalled(policy, stepwise, back):
    arrays = random_layer(1, 4, 2)
    # Before, at and after rows go to the archive, and in the first of them.
    for to in (129, 250, 256, 257, 383, 384, 390):
        cache = new_cache(policy, journal=16)
        feed(cache, arrays, [to])
        never = snapshot(cache)
        feed(cache, arrays, [1] * back if stepwise else [back], to)
        assert cache.trim(back) == back
        assert_same(never, snapshot(cache))
        again = feed(cache, arrays, [LENGTH - to], to)
        fresh = new_cache(policy, journal=16)
        feed(fresh, arrays, [to])
        assert np.abs(again - feed(fresh, arrays, [LENGTH - to], to)).max() < 1e-5
    # Before the first rows went to the archive.
    cache = new_cache(policy, journal=16)
    feed(cache, arrays, [1] * 128 if stepwise else [128])
    more = min(back, 15)
    feed(cache, arrays, [1] * more if stepwise else [more], 128)
    assert cache.trim(more + 1) == more + 1
    assert_same(snapshot(cache), snapshot(PolicyKVCache.from_state(cache.state)))
    cache = new_cache(policy, journal=16)
    feed(cache, arrays, [LENGTH])
    assert cache.trim(LENGTH) == LENGTH
    assert cache.slots.recall == cache.slots.recall.empty()


@pytest.mark.parametrize("policy", ["tova", "fade"])
@pytest.mark.parametrize("chunks", [[150], [3, *[1] * 40, 107]], ids=len)
def test_tokens_are_taken_back_over_several_flushes(policy, chunks):
    arrays, others = random_layer(1, 4, 2), random_layer(6, 4, 2)
    cache = new_cache(policy, journal=150)
    feed(cache, arrays, [250])
    never = snapshot(cache)
    feed(cache, others, chunks, 250)
    assert [f.offset for f in cache.slots.recall.flushes] == [*range(256, 400, SLOTS)]
    assert cache.trim(150) == 150
    assert_same(never, snapshot(cache))


@pytest.mark.parametrize("journal", [0, 4])
@pytest.mark.parametrize("seen", [256, 257, 260, 261])
def test_one_token_more_than_promised_is_taken_back_exactly_or_not(journal, seen):
    arrays = random_layer(1, 4, 2)
    cache = new_cache(journal=journal)
    feed(cache, arrays, [1] * seen)
    # The last victim is in its slot, so it is at hand beside those in the journal.
    if cache.can_trim(journal + 1):
        cache.trim(journal + 1)
    else:
        with pytest.raises(CacheStateError, match="cannot be taken back"):
            cache.trim(journal + 1)
    fresh = new_cache(journal=journal)
    feed(fresh, arrays, [cache.seen])
    assert_same(snapshot(fresh), snapshot(cache))
    assert PolicyKVCache.from_state(cache.state).seen == cache.seen


def test_a_copy_and_its_original_go_their_own_ways():
    arrays, others = random_layer(1, 4, 2), random_layer(2, 4, 2)
    cache = new_cache(journal=4)
    feed(cache, arrays, [300])
    twin = copy.deepcopy(cache)
    feed(twin, others, [120], 300)
    alone = new_cache(journal=4)
    feed(alone, arrays, [300])
    want = feed(alone, arrays, [120], 300)
    assert np.abs(feed(cache, arrays, [120], 300) - want).max() < 1e-6


@pytest.mark.parametrize("seen", [25, 128, 131, 257, 384, 400])
@pytest.mark.parametrize("stepwise", [True, False])
def test_a_saved_cache_goes_on_as_if_it_had_not_been(seen, stepwise, tmp_path):
    arrays = random_layer(3, 4, 2)
    for policy in ("fade", "streaming", "keydiff"):
        cache = new_cache(policy)
        feed(cache, arrays, [1] * seen if stepwise else [seen])
        path = str(tmp_path / "cache.safetensors")
        mlx_lm_cache.save_prompt_cache(path, [cache])
        (loaded,) = mlx_lm_cache.load_prompt_cache(path)
        assert_same(snapshot(cache), snapshot(loaded))
        rest = [1, 7, LENGTH - seen - 8]
        want = feed(cache, arrays, rest, seen)
        assert np.array_equal(feed(loaded, arrays, rest, seen), want)


def damaged(change):
    """The state of a cache, its recall's arrays changed."""
    arrays = random_layer(3, 4, 2)
    cache = new_cache("fade")
    feed(cache, arrays, [300])
    state = list(cache.state)
    at = next(i for i, part in enumerate(state) if isinstance(part, tuple))
    parts = [list(p) if isinstance(p, tuple) else p for p in state[at]]
    change(parts)
    state[at] = parts
    return tuple(state)


def _set(i, j, change):
    def changed(parts):
        if j is None:
            parts[i] = change(parts[i])
        else:
            parts[i][j] = change(parts[i][j])

    return changed


@pytest.mark.parametrize(
    "change",
    [
        _set(0, 0, lambda a: a[:, :, :256]),
        _set(0, 1, lambda a: a * mx.nan),
        _set(0, 2, lambda a: a + 1),
        _set(0, 2, lambda a: a[..., :-16]),
        _set(0, 2, lambda a: a.astype(mx.int64)),
        _set(0, 2, lambda a: None),
        _set(1, 0, lambda a: a[:, :, 1:]),
        _set(1, 2, lambda a: a + 1),
        _set(1, 2, lambda a: a.astype(mx.int64)),
    ],
)
def test_what_no_reading_could_have_left_is_refused(change):
    with pytest.raises(CacheStateError, match="not the state"):
        PolicyKVCache.from_state(damaged(change))
    assert PolicyKVCache.from_state(damaged(lambda parts: None)).seen == 300


def test_bytes_stay_below_what_is_said_and_the_archive_is_counted_apart():
    arrays = random_layer(4, 4, 2)
    for policy in ("tova", "fade", "streaming"):
        for journal in (0, 16):
            cache = new_cache(policy, journal=journal)
            most = waited = 0
            for start in range(0, LENGTH, 5):
                feed(cache, arrays, [5], start)
                most = max(most, cache.slots.nbytes)
                if (waiting := cache.slots.recall.waiting) is not None:
                    waited = max(waited, waiting.length)
            # The slots that recall has are of what was evicted last.
            assert SLOTS - 4 <= waited <= SLOTS + 1
            assert 0.5 * cache.max_nbytes < most <= cache.max_nbytes
            assert cache.nbytes == cache.slots.nbytes + cache.archive_nbytes
            row = describe([cache]).rows[0]
            assert row.bytes_now == cache.slots.nbytes
            assert row.archive_bytes == cache.archive_nbytes > 0
            assert row.archived == (LENGTH // SLOTS * SLOTS) - 1 - LIMIT
            assert row.recalled == LENGTH - row.tokens_held


def test_what_cannot_work_is_refused():
    for recall in (-16, 8, 17, True, 16.0, "16"):
        with pytest.raises(OptionError, match="recall"):
            PolicyKVCache(64, recall=recall)
    with pytest.raises(OptionError, match="leaves the policy none"):
        PolicyKVCache(64, recall=64)
    with pytest.raises(OptionError, match="leaves no room"):
        PolicyKVCache(36, "streaming", recall=32)
    with pytest.raises(OptionError, match="evicts nothing"):
        PolicyKVCache(None, "full", recall=16)
    with pytest.raises(OptionError, match="prefill"):
        PolicyKVCache(64, recall=16, prefill="once")


def on_disk(cache, path, name="layer", **options):
    cache.archive_on(Disk(LogDirectory(path), name, **options))
    return cache


@pytest.mark.parametrize("policy", ["tova", "fade", "streaming", "keydiff"])
@pytest.mark.parametrize("options", [{}, {"granularity": "head"}])
def test_an_archive_on_disk_gives_what_one_in_memory_gives(policy, options, tmp_path):
    if options and "granularity" not in POLICIES[policy].options:
        return
    arrays = random_layer(5, 4, 2)
    here = new_cache(policy, **options)
    there = on_disk(new_cache(policy, **options), tmp_path / "a")
    for start in range(0, LENGTH, 70):
        want = feed(here, arrays, [70], start)
        assert np.abs(feed(there, arrays, [70], start) - want).max() < 1e-6
    assert window(here) == window(there)
    log = sum(f.stat().st_size for f in (tmp_path / "a").glob("*.rows"))
    assert there.archive_nbytes == log > 0


@pytest.mark.parametrize("back", [1, 8, 16])
def test_rows_on_disk_are_taken_back_too(back, tmp_path):
    arrays, others = random_layer(1, 4, 2), random_layer(6, 4, 2)
    for i, to in enumerate((250, 256, 257, 383, 384, 390)):
        fresh = new_cache(journal=16)
        feed(fresh, arrays, [to])
        want = feed(fresh, arrays, [LENGTH - to], to)
        cache = on_disk(new_cache(journal=16), tmp_path / str(i))
        feed(cache, arrays, [to])
        feed(cache, others, [1] * back, to)
        assert cache.trim(back) == back
        assert np.abs(feed(cache, arrays, [LENGTH - to], to) - want).max() < 1e-5


def test_what_is_lost_is_not_taken_back(monkeypatch, tmp_path):
    def write(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    arrays = random_layer(1, 4, 2)
    cache = on_disk(new_cache(journal=16), tmp_path / "a", forgets=True)
    feed(cache, arrays, [350])
    with monkeypatch.context() as context:
        context.setattr(os, "pwrite", write)
        # Rows are archived after 352, and some cannot be written.
        feed(cache, arrays, [6], 350)
    assert cache.slots.recall.archive.lost
    assert cache.can_trim(6)
    cache.archive_on(None)
    assert cache.can_trim(4)
    assert not cache.can_trim(5)


def test_of_copies_on_one_disk_one_goes_on(tmp_path):
    arrays, others = random_layer(1, 4, 2), random_layer(2, 4, 2)
    cache = on_disk(new_cache(), tmp_path / "a")
    feed(cache, arrays, [300])
    twin = copy.deepcopy(cache)
    feed(twin, others, [100], 300)
    alone = new_cache()
    feed(alone, arrays, [300])
    want = feed(alone, arrays, [120], 300)
    assert np.abs(feed(cache, arrays, [120], 300) - want).max() < 1e-6
    with pytest.raises(CacheStateError, match="copy of this cache has gone on"):
        feed(twin, others, [8], 400)


def test_what_is_on_disk_is_saved_and_goes_on_where_it_is_loaded(tmp_path):
    arrays = random_layer(3, 4, 2)
    cache = on_disk(new_cache("fade"), tmp_path / "a")
    feed(cache, arrays, [300])
    path = save_prompt_cache(tmp_path / "prompt", [cache])
    (loaded,), _ = load_prompt_cache(path)
    want = feed(cache, arrays, [120], 300)
    assert np.abs(feed(loaded, arrays, [120], 300) - want).max() < 1e-6
    (again,), _ = load_prompt_cache(path)
    on_disk(again, tmp_path / "b")
    assert np.abs(feed(again, arrays, [120], 300) - want).max() < 1e-6
    mlx_lm_cache.save_prompt_cache(str(tmp_path / "no.safetensors"), [cache])
    with pytest.raises(CacheStateError, match="archive on disk"):
        load_prompt_cache(tmp_path / "no")


@pytest.mark.parametrize("forgets", [False, True])
def test_a_disk_that_takes_no_more_ends_it_or_is_done_without(
    forgets, tmp_path, monkeypatch
):
    def write(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    arrays = random_layer(3, 4, 2)
    cache = on_disk(new_cache(), tmp_path / "a", forgets=forgets)
    feed(cache, arrays, [270])
    alone = new_cache()
    feed(alone, arrays, [270])
    with monkeypatch.context() as context:
        context.setattr(os, "pwrite", write)
        context.setattr(os, "write", write)
        if forgets:
            feed(cache, arrays, [150], 270)
        else:
            with pytest.raises(CacheStateError, match="No space left"):
                feed(cache, arrays, [150], 270)
    if forgets:
        disk = cache.slots.recall.archive.disk
        assert "No space left" in disk.failed
        assert disk.lost_after > 0
        # What was written before is there, and nothing else.
        there = disk.rows().positions
        assert {p for head in window(cache) for p in head} <= set(
            there.flatten().tolist()
        )
        path = save_prompt_cache(tmp_path / "prompt", [cache])
        (loaded,), _ = load_prompt_cache(path)
        assert loaded.slots.recall.archive.lost == disk.lost_after
    else:
        # It is as it was before what could not be written.
        cache.trim(cache.seen - 270)
        assert cache.seen == 270
        cache.archive_on(None)
        assert_same(snapshot(alone), snapshot(cache))


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        # Of some four neighbours one goes and the others stay.
        ("streaming", {"n_sinks": 3}),
        # Tokens are evicted in another order than they came in.
        ("tova", {}),
        ("fade", {"granularity": "head"}),
    ],
)
def test_a_limit_on_disk_is_kept_and_the_oldest_go(policy, options, tmp_path):
    arrays = random_layer(3, 4, 2)
    limit = 128 * 150
    cache = on_disk(new_cache(policy, **options), tmp_path / "a", limit=limit)
    outputs = feed(cache, arrays, [LENGTH - 30])
    # What goes within a chunk is out of the sight of the rest of it.
    stepwise = on_disk(new_cache(policy, **options), tmp_path / "b", limit=limit)
    by_one = feed(stepwise, arrays, [1] * (LENGTH - 30))
    assert np.abs(outputs - by_one).max() < 1e-4
    disk = cache.slots.recall.archive.disk
    assert 0 < disk.nbytes < 1.1 * limit
    found = set(disk.rows().positions.flatten().tolist())
    assert len(found) < cache.archived
    assert {p for head in window(cache) for p in head} <= found
    path = save_prompt_cache(tmp_path / "prompt", [cache])
    (loaded,), _ = load_prompt_cache(path)
    assert loaded.slots.recall.archive.lost > 0
    # Until rows go to the archive again: that in memory has no limit.
    want = feed(cache, arrays, [25], LENGTH - 30)
    assert np.abs(feed(loaded, arrays, [25], LENGTH - 30) - want).max() < 1e-6


@pytest.fixture(scope="module")
def model():
    return tiny.make(n_heads=4, n_kv_heads=2, head_dim=64)


def exactly(caches):
    """Caches that archive rows as they come, so that no code can flip."""
    for cache in caches:
        recall = cache.slots.recall
        cache.slots.recall = replace(recall, archive=Archive(PLAIN))
    return caches


@pytest.mark.parametrize("policy", ["tova", "streaming", "keydiff"])
def test_in_a_model_chunks_do_not_matter(model, policy):
    tokens = tiny.tokens(300)
    how = {"policy": policy, "recall": 32, "journal": 0}
    logits = {}
    for chunk in (1, 77, 300):
        caches = exactly(make_prompt_cache(model, 60, **how))
        logits[chunk] = np.array(tiny.feed(model, tokens, caches, chunk))
    assert np.abs(logits[1] - logits[77]).max() < 2e-3
    assert np.abs(logits[1] - logits[300]).max() < 2e-3
    without = make_prompt_cache(model, 60 - 32, policy=policy)
    assert np.abs(tiny.feed(model, tokens, without, 77) - logits[77]).max() > 0.01


@pytest.mark.parametrize("loaded", [False, True])
def test_another_thread_goes_on_where_the_state_was_evaluated(model, loaded, tmp_path):
    caches = make_prompt_cache(model, 60, recall=32)
    # Rows have just gone to the archive.
    tiny.feed(model, tiny.tokens(256), caches, 64)
    mx.eval([cache.state for cache in caches])
    twins = copy.deepcopy(caches)
    if loaded:
        path = save_prompt_cache(tmp_path / "prompt", caches)
        twins, _ = load_prompt_cache(path)

    def go_on(caches):
        return np.array(tiny.feed(model, tiny.tokens(20), caches, 1))

    with ThreadPoolExecutor(1) as other:
        got = other.submit(go_on, twins).result()
    assert np.array_equal(got, go_on(caches))


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_rows_of_a_batch_recall_what_each_evicted(model, kv_bits):
    texts = [tiny.tokens(n, seed=n) for n in (200, 260, 137)]
    how = {"policy": "fade", "recall": 32, "journal": 0, "kv_bits": kv_bits}
    alone, single = [], []
    for tokens in texts:
        caches = make_prompt_cache(model, 60, **how)
        tiny.feed(model, tokens, caches, 500)
        single.append(copy.deepcopy(caches))
        alone.append(tiny.feed(model, tiny.tokens(20), caches, 1))
    batch = [layer[0].merge(layer) for layer in zip(*single, strict=True)]
    rows = mx.concatenate([tiny.tokens(20)] * 3)
    together = tiny.feed(model, rows, batch, 1)
    assert np.abs(np.array(together) - np.concatenate(alone)).max() < 1e-3
    out = [layer.extract(1) for layer in batch]
    assert [c.recalled_positions for c in out] == [
        c.recalled_positions for c in (layer._rows[1] for layer in batch)
    ]
    assert all(c.archived == 256 - 1 - 28 for c in out)


def test_drafts_that_are_rejected_change_nothing(model):
    draft = tiny.make(seed=3, n_heads=4, n_kv_heads=2, head_dim=64)
    prompt = tiny.tokens(120)[0]
    how = {"policy": "tova", "recall": 32}

    def answer(**options):
        return [int(t) for t, *_ in options.pop("step")(prompt, model, **options)]

    caches = exactly(make_prompt_cache(model, 60, **how))
    want = answer(step=generate_step, prompt_cache=caches, max_tokens=60)
    for n in (1, 3, 7):
        both = make_prompt_cache(model, 60, **how) + make_prompt_cache(draft, 60, **how)
        got = answer(
            step=partial(speculative_generate_step, draft_model=draft),
            prompt_cache=exactly(both),
            max_tokens=60,
            num_draft_tokens=n,
        )
        assert got == want


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("deepseek_v3", "latents"),
        ("gemma3n", "share keys and values"),
        ("gemma2", "its own attention"),
    ],
)
def test_models_that_it_would_be_wrong_with_are_refused(name, reason):
    model = zoo.make(name)
    with pytest.raises(UnsupportedModelError, match=reason):
        make_prompt_cache(model, 64, policy="streaming", recall=32, kv_group_size=32)


def test_bits_that_come_on_the_way_are_refused(model):
    cache = make_prompt_cache(model, 64, recall=32)[0]
    with pytest.raises(OptionError, match="Give kv_bits"):
        cache.to_quantized(bits=8)


def test_positions_that_are_renumbered_are_refused_and_auto_are_not(model):
    with pytest.raises(OptionError, match="positions='original'"):
        make_prompt_cache(model, 64, recall=32, positions="compact")
    made = make_prompt_cache(model, 64, recall=32, positions="auto")
    assert made[0].options.renumbering is None
    with pytest.raises(OptionError, match="read with recall only"):
        make_prompt_cache(model, 64, archive="/tmp/x")
    with pytest.raises(OptionError, match="does not divide rows of 8"):
        make_prompt_cache(tiny.make(), 64, recall=32)


def test_a_model_archives_on_disk_and_leaves_nothing(model, tmp_path):
    tokens = tiny.tokens(400)
    how = {"policy": "fade", "recall": 32, "journal": 0}
    here = make_prompt_cache(model, 60, **how)
    want = np.array(tiny.feed(model, tokens, here, 100))
    convert(model, 60, archive=str(tmp_path / "a"), **how)
    try:
        there, other = (mlx_lm_cache.make_prompt_cache(model) for _ in range(2))
        assert (
            np.abs(np.array(tiny.feed(model, tokens, there, 100)) - want).max() < 1e-4
        )
        tiny.feed(model, tokens, other, 100)
        assert {p.name for p in (tmp_path / "a").iterdir()} == {
            "caches-000",
            "caches-001",
        }
        report = describe(there)
        assert report.totals["archive_bytes"] > 0
        assert report.totals["archived"] == 384 - 1 - 28
        assert "archive bytes" in str(report)
        tiny.feed(model, tokens, there, 100)
        assert all(c.nbytes == c.slots.nbytes <= c.max_nbytes for c in there)
        path = save_prompt_cache(tmp_path / "prompt", there, model=model)
        loaded, _ = load_prompt_cache(path, model=model)
        more = tiny.tokens(30, seed=5)
        want = tiny.feed(model, more, there, 10)
        assert np.abs(tiny.feed(model, more, loaded, 10) - want).max() < 1e-4
    finally:
        revert(model)
    del there, other
    gc.collect()
    assert not list((tmp_path / "a").iterdir())


PROGRAM = """
import sys, time
sys.path.insert(0, sys.argv[2])
import mlx.core as mx, tiny
from tova_mlx import make_prompt_cache
model = tiny.make(n_heads=4, n_kv_heads=2, head_dim=64)
caches = make_prompt_cache(model, 60, recall=32, archive=sys.argv[1])
for _ in range(2000):
    tiny.feed(model, tiny.tokens(50), caches, 50)
    print(caches[0].seen, flush=True)
"""


def test_a_killed_run_leaves_a_directory_that_can_be_used_again(model, tmp_path):
    place = tmp_path / "a"
    command = [sys.executable, "-c", PROGRAM, str(place), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        while int(running.stdout.readline()) < 600:
            pass
        with pytest.raises(OptionError, match="in use by another process"):
            make_prompt_cache(model, 60, recall=32, archive=place)
        running.kill()
    assert list(place.rglob("*.rows"))
    caches = make_prompt_cache(model, 60, recall=32, archive=place)
    assert not list(place.rglob("*.rows"))
    tiny.feed(model, tiny.tokens(300), caches, 100)
    assert caches[0].archived == 288 - 1 - 28
    del caches
    gc.collect()
    assert not list(place.iterdir())


def test_a_directory_that_cannot_be_written_is_refused(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="archive"):
        make_prompt_cache(model, 60, recall=32, archive=tmp_path / "file" / "a")


@pytest.mark.parametrize("length", [1, 70])
@pytest.mark.parametrize("many", [0, 1 << 20])
def test_an_archive_is_read_in_tiles_as_in_one(monkeypatch, length, many):
    rng = np.random.default_rng(5)
    n = 16
    # Here and there, in no order, each head another.
    there = np.stack([rng.choice(600, 250, replace=False) for _ in range(2)])
    keys, values = rng.normal(size=(2, 1, 2, 250, 64)).astype(np.float32)
    queries = mx.array(rng.normal(size=(1, 6, length, 64)).astype(np.float32) / 4)
    rows = Rows(mx.array(keys), mx.array(values), mx.array(there, mx.int32)[None])
    archive = Archive(PLAIN).add(rows)
    want = recalled.recall(queries, archive)
    most = recalled.attended_most(queries, archive, 250, n)
    monkeypatch.setattr("tova_mlx.storage.archive.TILE", 64)
    monkeypatch.setattr(recalled, "_MANY", many)
    got = recalled.recall(queries, archive)
    assert np.array_equal(recalled.attended_most(queries, archive, 250, n), most)
    last = recalled.attended_most(queries[:, :, -1:], archive, 250, n)
    assert np.array_equal(most[:, :, -1:], last)
    for a, b in zip(got, want, strict=True):
        assert np.abs(np.array(a) - np.array(b)).max() < 1e-5
    # By hand.
    for head, step in ((0, 0), (5, length - 1)):
        kv = head // 3
        logits = np.array(queries)[0, 3 * kv : 3 * kv + 3, step] @ keys[0, kv].T
        weights = np.exp(logits[head % 3])
        output = weights @ values[0, kv] / weights.sum()
        assert np.abs(np.array(got.output[0, head, step]) - output).max() < 1e-4
        assert abs(got.lse[0, head, step].item() - np.log(weights.sum())) < 1e-4
        best = there[kv, logits.max(axis=0).argmax()] // 16
        read = most[0, kv, step]
        assert set(read) - {-1} == set(there[kv][there[kv] // 16 == best])
        early = recalled.attended_most(queries, archive, 100, n)[0, kv, step]
        best = there[kv, logits[:, :100].max(axis=0).argmax()] // 16
        wanted = there[kv, :100]
        assert set(early) - {-1} == set(wanted[wanted // 16 == best])


def test_logits_far_below_zero_count():
    values = mx.random.normal((1, 1, 5, 64))
    there = mx.arange(5, dtype=mx.int32)[None, None]
    archive = Archive(PLAIN).add(Rows(mx.full((1, 1, 5, 64), -4.0), values, there))
    got = recalled.recall(mx.ones((1, 1, 1, 64)), archive)
    assert mx.allclose(got.output, values.mean(axis=2, keepdims=True), atol=1e-5)
    assert abs(got.lse.item() - (np.log(5) - 256)) < 1e-4
