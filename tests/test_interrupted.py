"""A forward that fails leaves a cache that is right, or that says what happened."""

import copy
import pickle

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_lm.models import cache as mlx_lm_cache
from test_cache import CASES, EXTRA

from tova_mlx import (
    PolicyKVCache,
    convert,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from tova_mlx.errors import CacheStateError, UnsupportedModelError

LIMIT = 12


class Stop(BaseException):
    """As KeyboardInterrupt: nothing catches it on the way."""


@pytest.fixture
def model():
    return tiny.make()


def interrupt(model, caches, tokens, layer, where, monkeypatch):
    """A forward that ends in one layer: before or in its attention, or after it."""
    mlp = model.layers[layer].mlp
    call = type(mlp).__call__

    def stop(*_, **__):
        raise Stop

    with monkeypatch.context() as patch:
        if where == "attention":
            patch.setattr(caches[layer], "attend", stop, raising=False)
        elif where == "update":
            patch.setattr(type(caches[layer].slots), "write_tokens", stop)
            patch.setattr(type(caches[layer].slots), "_positions", stop)
        else:
            ends = lambda self, x: stop() if self is mlp else call(self, x)  # noqa: E731
            patch.setattr(type(mlp), "__call__", ends)
        with pytest.raises(Stop):
            model(tokens, cache=caches)


def same(model, caches, other):
    for a, b in zip(caches, other, strict=True):
        assert (a.offset, a.size()) == (b.offset, b.size())
        assert np.array_equal(a.positions, b.positions)
    rest = tiny.tokens(9, seed=9)
    got, want = (tiny.feed(model, rest, c, [1, 1, 1, 4, 1, 1]) for c in (caches, other))
    assert mx.abs(got - want).max().item() < 1e-4


@pytest.mark.parametrize(("policy", "options"), CASES + EXTRA)
@pytest.mark.parametrize("seen", [5, 40])
@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("where", ["attention", "after"])
def test_it_can_be_taken_back(
    model, policy, options, seen, length, layer, where, monkeypatch
):
    by_age = policy in ("full", "window", "streaming")
    caches = make_prompt_cache(model, LIMIT, policy=policy, **options)
    tiny.feed(model, tiny.tokens(seen), caches, [seen - 1, 1])
    before = copy.deepcopy(caches)
    tokens = tiny.tokens(length, seed=3)
    interrupt(model, caches, tokens, layer, where, monkeypatch)
    if where == "attention" and not by_age:
        assert not caches[layer].is_trimmable()
        with pytest.raises(CacheStateError, match="the last forward was interrupted"):
            _ = caches[layer].state
    # With the last layer nothing shows but that its output never came.
    if (layer, where) != (2, "after") and not (layer == 2 and by_age):
        with pytest.raises(CacheStateError, match=r"interrupted.*trim_prompt_cache"):
            model(tokens, cache=copy.deepcopy(caches))
    assert mlx_lm_cache.trim_prompt_cache(caches, length) == length
    same(model, caches, before)


@pytest.mark.parametrize("policy", ["tova", "h2o", "streaming", "keydiff"])
@pytest.mark.parametrize("length", [1, 6, 30])
def test_an_update_that_fails_has_not_been(model, policy, length, monkeypatch):
    caches = make_prompt_cache(model, LIMIT, policy=policy)
    tiny.feed(model, tiny.tokens(20), caches, [19, 1])
    before = copy.deepcopy(caches)
    interrupt(model, caches, tiny.tokens(length, seed=3), 0, "update", monkeypatch)
    same(model, caches, before)


@pytest.mark.parametrize("policy", ["tova", "fade", "keydiff"])
def test_without_a_journal_the_layer_itself_can_go_back(model, policy):
    cache = PolicyKVCache(LIMIT, policy, journal=0)
    rng = np.random.default_rng(0)

    def rows(n):
        return mx.array(rng.normal(size=(1, 2, n, 8)).astype(np.float32))

    stored = cache.update_and_fetch(rows(30), rows(30))
    cache.attend(rows(30), *stored, scale=1.0, mask="causal")
    before = copy.deepcopy(cache)
    for n in (1, 7):
        cache.update_and_fetch(rows(n), rows(n))
        assert not cache.can_trim(n + 1)
        assert n == 1 or not cache.can_trim(n - 1)
        assert cache.trim(n) == n
        assert cache.offset == 30
        assert np.array_equal(cache.positions, before.positions)
        for got, want in zip(
            cache.keys_and_values(), before.keys_and_values(), strict=True
        ):
            assert mx.array_equal(got, want)


def test_a_first_forward_may_have_been_interrupted_or_unseen(model, monkeypatch):
    caches = make_prompt_cache(model, LIMIT)
    interrupt(model, caches, tiny.tokens(20), 1, "attention", monkeypatch)
    with pytest.raises(UnsupportedModelError, match=r"stored 20 tokens.*interrupted"):
        caches[1].update_and_fetch(mx.zeros((1, 2, 1, 8)), mx.zeros((1, 2, 1, 8)))
    assert mlx_lm_cache.trim_prompt_cache(caches, 20) == 20
    same(model, caches, make_prompt_cache(model, LIMIT))


def test_what_cannot_be_taken_back_is_said(model, monkeypatch):
    caches = make_prompt_cache(model, LIMIT)
    tiny.feed(model, tiny.tokens(20), caches, 20)
    interrupt(model, caches, tiny.tokens(30), 1, "attention", monkeypatch)
    before = [np.array(c.slots.positions) for c in caches]
    assert mlx_lm_cache.trim_prompt_cache(caches, 30) == 0
    with pytest.raises(CacheStateError, match="a forward was interrupted"):
        model(tiny.tokens(1), cache=caches[:1] + caches[2:])
    assert all(map(np.array_equal, before[1:], [c.slots.positions for c in caches[1:]]))


@pytest.mark.parametrize("how", ["made", "converted", "loaded"])
def test_layers_watch_each_other_however_their_caches_came(how, tmp_path, monkeypatch):
    model = tiny.make()
    convert(model, LIMIT)
    caches = make_prompt_cache(model, LIMIT)
    if how == "converted":
        caches = model.make_cache()
    tiny.feed(model, tiny.tokens(20), caches, 20)
    if how == "loaded":
        path = save_prompt_cache(tmp_path / "a", caches, model=model)
        caches, _ = load_prompt_cache(path, model=model)
    interrupt(model, caches, tiny.tokens(1), 0, "after", monkeypatch)
    with pytest.raises(CacheStateError, match="a forward was interrupted"):
        model(tiny.tokens(1), cache=caches)


def test_copies_watch_their_own_layers_only(model):
    caches = make_prompt_cache(model, LIMIT)
    tiny.feed(model, tiny.tokens(20), caches, 20)
    alone = copy.deepcopy(caches[2])
    twins, others = copy.deepcopy(caches), pickle.loads(pickle.dumps(caches))
    for some in (twins, others, caches):
        tiny.feed(model, tiny.tokens(3), some, 1)
        tiny.feed(model, tiny.tokens(4), some, 4)
    stored = alone.update_and_fetch(mx.zeros((1, 2, 1, 8)), mx.zeros((1, 2, 1, 8)))
    alone.attend(mx.zeros((1, 6, 1, 8)), *stored, scale=1.0, mask=None)
    assert alone.offset == 21


def test_a_failed_step_of_a_batch_is_said(model, monkeypatch):
    rows = [make_prompt_cache(model, LIMIT) for _ in range(2)]
    caches = [layer[0].merge(layer) for layer in zip(*rows, strict=True)]
    tiny.feed(model, tiny.tokens(20, batch=2), caches, [19, 1])
    with monkeypatch.context() as patch:
        patch.setattr(caches[1], "attend", lambda *_, **__: 1 / 0, raising=False)
        with pytest.raises(ZeroDivisionError):
            model(tiny.tokens(1, batch=2), cache=caches)
    zeros = mx.zeros((2, 2, 1, 8))
    with pytest.raises(CacheStateError, match="the last forward was interrupted"):
        caches[1].update_and_fetch(zeros, zeros)
