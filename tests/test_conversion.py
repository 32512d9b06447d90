"""convert sets what mlx-lm's tools ask for caches, and revert puts it back."""

import copy
import gc

import mlx.core as mx
import pytest
import tiny
import zoo
from mlx_lm.generate import generate_step
from mlx_lm.models import cache as mlx_lm_cache

from tova_mlx import TOVACache, convert, describe, make_prompt_cache, revert
from tova_mlx.errors import OptionError, UnsupportedModelError
from tova_mlx.models.conversion import default_bytes, pin_in_new_caches


def kinds(model):
    return [type(c).__name__ for c in mlx_lm_cache.make_prompt_cache(model)]


def test_a_converted_model_makes_bounded_caches_for_every_tool():
    model = tiny.make()
    report = convert(model, 16)
    assert kinds(model) == ["TOVACache"] * 3
    assert mlx_lm_cache.make_prompt_cache(model, max_kv_size=999)[0].max_size == 16
    assert report.totals["bytes_at_most"] > 0
    assert describe(model).to_dict() == report.to_dict()
    caches = mlx_lm_cache.make_prompt_cache(model)
    prompt = tiny.tokens(50)[0]
    got = [
        t for t, _ in generate_step(prompt, model, prompt_cache=caches, max_tokens=9)
    ]
    assert sum(c.nbytes for c in caches) == report.totals["bytes_at_most"]
    revert(model)
    caches = make_prompt_cache(model, 16)
    want = [
        t for t, _ in generate_step(prompt, model, prompt_cache=caches, max_tokens=9)
    ]
    assert got == want


def test_a_second_conversion_replaces_the_first():
    model = tiny.make()
    convert(model, 16)
    convert(model, 32, policy="streaming", n_sinks=2)
    assert [c.rule.policy for c in model.make_cache()] == ["streaming"] * 3
    assert model.make_cache()[0].max_size == 32
    revert(model)
    assert kinds(model) == ["KVCache"] * 3


@pytest.mark.parametrize("own", ["class", "instance", "none"])
def test_reverting_restores_what_was_there(own, monkeypatch):
    model = tiny.make()

    def maker(_=None):
        return [mlx_lm_cache.KVCache() for _ in range(3)]

    if own == "class":
        monkeypatch.setattr(type(model), "make_cache", maker, raising=False)
    elif own == "instance":
        model.make_cache = maker
    before, had = dict(vars(model)), getattr(model, "make_cache", None)
    convert(model, 16)
    convert(model, 8)
    assert isinstance(model.make_cache()[0], TOVACache)
    revert(model)
    assert vars(model) == before
    assert getattr(model, "make_cache", None) == had
    revert(model)
    assert kinds(model) == ["KVCache"] * 3


def test_a_conversion_that_cannot_work_leaves_the_model_as_it_was():
    model = tiny.make()
    convert(model, 16)
    with pytest.raises(OptionError):
        convert(model, 0)
    assert model.make_cache()[0].max_size == 16
    refused = tiny.make_own_attention()
    with pytest.raises(UnsupportedModelError, match="computes its own attention"):
        convert(refused, 16)
    assert set(kinds(refused)) == {"KVCache"}


def test_a_copy_of_a_converted_model_makes_caches_of_its_own():
    model = tiny.make()
    convert(model, 12)
    pin_in_new_caches(model, 3)
    twin = copy.deepcopy(model)
    pin_in_new_caches(model, 5)
    assert [c.rule.pinned for c in model.make_cache()] == [5] * 3
    tokens = tiny.tokens(20)
    want = tiny.feed(model, tokens, make_prompt_cache(model, 12), 20)
    # It holds on to nothing of the other.
    del model
    gc.collect()
    caches = twin.make_cache()
    assert [c.rule.pinned for c in caches] == [3] * 3
    pin_in_new_caches(twin, 0)
    assert mx.allclose(tiny.feed(twin, tokens, twin.make_cache(), 20), want, atol=1e-4)
    revert(twin)
    assert kinds(twin) == ["KVCache"] * 3


def test_caches_of_a_converted_model_can_be_copied():
    # The server copies stored caches before it uses them.
    model = tiny.make()
    convert(model, 8)
    caches = model.make_cache()
    tiny.feed(model, tiny.tokens(20), caches, 20)
    twin = copy.deepcopy(caches)
    tiny.feed(model, tiny.tokens(5), caches, 5)
    a = tiny.feed(model, tiny.tokens(4), twin, 4)
    fresh = model.make_cache()
    tiny.feed(model, tiny.tokens(20), fresh, 20)
    assert mx.array_equal(a, tiny.feed(model, tiny.tokens(4), fresh, 4))


@pytest.mark.parametrize("name", ["gemma3", "llama", "qwen3_next"])
def test_bytes_without_us_are_those_of_the_tokens_in_mlx_lms_caches(name):
    model = zoo.make(name)
    caches = mlx_lm_cache.make_prompt_cache(model)
    convert(model, 16)
    for length in (40, 60):
        tiny.feed(model, tiny.tokens(length, seed=length), caches, 20)
        seen, taken = max(getattr(c, "offset", 0) for c in caches), 0
        for cache in caches:
            if isinstance(cache, mlx_lm_cache.ArraysCache):
                taken += cache.nbytes
                continue
            # Of 72 tokens at most where mlx-lm has a window.
            held = min(cache.offset, getattr(cache, "max_size", cache.offset))
            heads, width = cache.keys.shape[1], cache.keys.shape[3]
            taken += 4 * held * heads * (width + cache.values.shape[3])
        assert default_bytes(model, seen) == taken
