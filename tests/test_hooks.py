"""What is put into mlx-lm: once, safe against reloads and threads, and taken out."""

import copy
import gc
import importlib
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_lm.models import base, llama
from mlx_lm.models import cache as mlx_lm_cache

import tova_mlx
from tova_mlx import (
    PolicyKVCache,
    TOVACache,
    convert,
    make_prompt_cache,
    observe_evictions,
    revert,
)
from tova_mlx.hooks import dispatcher, registration, replacing, trimming


@pytest.fixture(autouse=True)
def as_new():
    dispatcher.uninstall()
    trimming.uninstall()
    yield
    dispatcher.uninstall()
    trimming.uninstall()
    dispatcher.install()
    trimming.install()


def works():
    """Whether a bounded cache sees what a model attends to, and others are as ever."""
    model, tokens = tiny.make(), tiny.tokens(30)
    caches = make_prompt_cache(model, 8)
    tiny.feed(model, tokens, caches, 7)
    assert [c.size() for c in caches] == [8, 8, 8]
    own = mlx_lm_cache.make_prompt_cache(model)
    assert mx.isfinite(tiny.feed(model, tokens, own, 7)).all()
    assert mlx_lm_cache.trim_prompt_cache(own, 3) == 3
    assert mlx_lm_cache.trim_prompt_cache(caches, 3) == 3
    return True


def test_installing_twice_and_taking_out_leaves_mlx_lm_as_it_was():
    theirs = base.scaled_dot_product_attention
    trim = mlx_lm_cache.trim_prompt_cache
    assert works()
    assert works()
    assert base.scaled_dot_product_attention is dispatcher.dispatch
    dispatcher.uninstall()
    trimming.uninstall()
    assert base.scaled_dot_product_attention is theirs
    assert llama.scaled_dot_product_attention is theirs
    assert mlx_lm_cache.trim_prompt_cache is trim
    assert sys.modules["mlx_lm.generate"].trim_prompt_cache is trim
    # Ours is still ours where our own modules use it.
    from tova_mlx.models import conversation

    assert conversation.trim_prompt_cache is trimming.trim_prompt_cache


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize(
    "module",
    ["mlx_lm.models.base", "mlx_lm.models.llama", "tova_mlx.hooks.dispatcher"],
)
def test_a_module_may_be_reloaded(module, installed):
    if installed:
        assert works()
    importlib.reload(sys.modules[module])
    assert works()
    dispatch = sys.modules["tova_mlx.hooks.dispatcher"].dispatch
    assert base.scaled_dot_product_attention is dispatch
    sys.modules["tova_mlx.hooks.dispatcher"].uninstall()
    theirs = base.scaled_dot_product_attention
    assert replacing.original(theirs) is theirs
    assert theirs.__module__ == "mlx_lm.models.base"


def test_a_reloaded_trimming_goes_on():
    assert works()
    importlib.reload(trimming)
    assert works()
    assert mlx_lm_cache.trim_prompt_cache is trimming.trim_prompt_cache
    original = replacing.original(mlx_lm_cache.trim_prompt_cache)
    assert original.__module__ == "mlx_lm.models.cache"


def test_threads_may_make_the_first_caches_at_once():
    for _ in range(20):
        dispatcher.uninstall()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: TOVACache(8), range(8)))
        theirs = replacing.original(dispatcher.dispatch)
        assert theirs.__module__ == "mlx_lm.models.base"
    assert works()


def test_making_a_cache_searches_no_modules(monkeypatch):
    TOVACache(8)
    monkeypatch.setattr(replacing, "_holding", lambda *_: pytest.fail("searched"))
    TOVACache(8)


def test_classes_can_be_unnamed():
    TOVACache(8)
    assert mlx_lm_cache.TOVACache is TOVACache
    registration.uninstall(TOVACache)
    assert not hasattr(mlx_lm_cache, "TOVACache")
    TOVACache(8)
    assert mlx_lm_cache.TOVACache is TOVACache


def test_a_class_of_somebody_else_keeps_its_name(monkeypatch):
    class TOVACache:
        """Not ours."""

    monkeypatch.setattr(mlx_lm_cache, "TOVACache", TOVACache, raising=False)
    registration.uninstall(tova_mlx.TOVACache)
    assert mlx_lm_cache.TOVACache is TOVACache


def test_a_replacement_knows_what_it_stands_for():
    def mine(*arguments):
        """Not marked as standing for anything."""

    theirs = base.scaled_dot_product_attention
    replacing.replace(base, "scaled_dot_product_attention", mine)
    assert llama.scaled_dot_product_attention is mine
    assert replacing.original(mine) is theirs
    replacing.put_back(base, "scaled_dot_product_attention")
    assert llama.scaled_dot_product_attention is theirs


@pytest.mark.parametrize("whose", ["ours", "mlx-lm's", "shared"])
def test_learned_sinks_reach_whoever_attends(whose):
    dispatcher.install()
    rows = mx.random.normal((1, 2, 3, 32), key=mx.random.key(0))
    sinks = mx.array([0.5, -1.0])
    cache = mlx_lm_cache.KVCache() if whose == "mlx-lm's" else TOVACache(8)
    if whose == "shared":
        cache.share()
    stored = cache.update_and_fetch(rows, rows)
    # A layer that shares keys has no cache to hand on.
    owners = [cache, None] if whose == "shared" else [cache]
    for owner in owners:
        how = {"scale": 0.2, "mask": "causal", "sinks": sinks}
        got = base.scaled_dot_product_attention(rows, *stored, cache=owner, **how)
        want = mx.fast.scaled_dot_product_attention(rows, *stored, **how)
        assert mx.abs(got - want).max() < 1e-5


def test_a_layer_without_a_cache_attends_as_the_owner_of_its_keys_says():
    dispatcher.install()
    rows = mx.random.normal((1, 2, 12, 32), key=mx.random.key(0))
    cache = TOVACache(4)
    cache.share()
    stored = cache.update_and_fetch(rows, rows)
    how = {"scale": 0.05, "mask": "causal"}
    want = base.scaled_dot_product_attention(rows, *stored, cache=cache, **how)
    got = base.scaled_dot_product_attention(rows, *stored, cache=None, **how)
    assert mx.abs(got - want).max() < 1e-5
    # Nobody evicted: not the same.
    plain = mx.fast.scaled_dot_product_attention(rows, rows, rows, **how)
    assert mx.abs(got - plain).max() > 1e-3


def test_a_converted_model_is_freed_with_its_last_name():
    model = tiny.make()
    convert(model, 8)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_options_are_resolved_once_per_conversion(monkeypatch):
    from tova_mlx.policies import base as policies_base

    asked = []
    real = policies_base.Policy.resolve

    def resolve(self, *arguments):
        asked.append(self.name)
        return real(self, *arguments)

    monkeypatch.setattr(policies_base.Policy, "resolve", resolve)
    model = tiny.make()
    convert(model, 8)
    mlx_lm_cache.make_prompt_cache(model)
    assert asked == ["tova"]
    revert(model)


def test_the_package_lists_what_it_has():
    assert set(tova_mlx.__all__) <= set(dir(tova_mlx))
    assert "importlib" not in dir(tova_mlx)
    for name in dir(tova_mlx):
        getattr(tova_mlx, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tova_mlx.nothing  # noqa: B018
    from tova_mlx import errors

    raised = [n for n in vars(errors) if n.endswith("Error")]
    assert set(raised) <= set(tova_mlx.__all__)


def test_a_cache_says_what_it_is():
    model = tiny.make()
    caches = make_prompt_cache(model, 8, policy="fade")
    tiny.feed(model, tiny.tokens(20), caches, 20)
    size = f"{caches[0].nbytes:,} bytes"
    said = f"<PolicyKVCache(8, 'fade'): holds 8 of 20 tokens, {size}>"
    assert repr(caches[0]) == said
    batch = caches[0].merge([caches[0], caches[1]])
    assert "2 rows, holds 8 of 20 tokens" in repr(batch)
    assert repr(PolicyKVCache(None, "full")).startswith("<PolicyKVCache(None, 'full')")


@pytest.mark.parametrize("policy", ["window", "streaming", "tova", "h2o", "keydiff"])
@pytest.mark.parametrize("options", [{}, {"journal": 0}])
def test_every_eviction_is_observed_once(policy, options):
    model, tokens = tiny.make(), tiny.tokens(50)
    caches = make_prompt_cache(model, 9, policy=policy, **options)
    seen = []
    with observe_evictions(caches, lambda *eviction: seen.append(eviction)):
        tiny.feed(model, tokens, caches, [6, 20, 1, 1, 13, *[1] * 9])
    for layer, cache in enumerate(caches):
        mine = [(s, np.array(p)) for i, s, p in seen if i == layer]
        steps = [step for s, _ in mine for step in s]
        assert steps == list(range(9, 50))
        evicted = np.concatenate([p for _, p in mine], axis=2)
        held = np.array(cache.positions)
        for head, kept in zip(evicted[0], held[0], strict=True):
            assert sorted([*head, *kept]) == list(range(50))
            assert (head <= steps).all()
    count = len(seen)
    tiny.feed(model, tokens, caches, 1)
    assert len(seen) == count, "observed after its end"


def test_who_went_back_to_nothing_is_still_observed_and_a_copy_is_not():
    model, tokens, seen = tiny.make(), tiny.tokens(12), []
    caches = make_prompt_cache(model, 9)
    with observe_evictions(caches, lambda *eviction: seen.append(eviction)):
        tiny.feed(model, tokens, caches, 12)
        assert [(layer, list(s)) for layer, s, _ in seen] == [
            (layer, [9, 10, 11]) for layer in range(3)
        ]
        twins = copy.deepcopy(caches)
        assert mlx_lm_cache.trim_prompt_cache(twins, 12) == 12
        assert mlx_lm_cache.trim_prompt_cache(caches, 12) == 12
        tiny.feed(model, tokens, twins, 12)
        assert len(seen) == 3
        tiny.feed(model, tokens, caches, [11, 1])
    assert [(layer, list(s)) for layer, s, _ in seen[3:]] == [
        (layer, steps) for steps in ([9, 10], [11]) for layer in range(3)
    ]


def test_a_cut_of_once_is_observed_at_its_step():
    model = tiny.make()
    caches = make_prompt_cache(model, 9, prefill="once")
    seen = []
    with observe_evictions(caches, lambda *eviction: seen.append(eviction)):
        tiny.feed(model, tiny.tokens(20), caches, 20)
    assert [list(s) for _, s, _ in seen] == [[19] * 11] * 3
    held = [np.array(c.positions).ravel() for c in caches]
    for layer, _, positions in seen:
        evicted = np.array(positions).ravel()
        assert sorted([*evicted, *held[layer]]) == list(range(20))
