"""Real weights: what random ones cannot show."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from mlx_lm import generate
from mlx_lm.models import cache as mlx_lm_cache

from tova_mlx import POLICIES, make_prompt_cache

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def tokens(demo, text):
    return mx.array(demo[1].encode(text)[:321])[None]


def perplexity(logits, tokens):
    return mx.exp(nn.losses.cross_entropy(logits, tokens).mean()).item()


def test_the_conversion_is_right(demo, tokens):
    # llama.cpp's permuted q and k rows, not undone, give hundreds.
    logits = demo[0](tokens[:, :-1])
    assert perplexity(logits, tokens[:, 1:]) < 60


@pytest.mark.parametrize("policy", POLICIES)
def test_chunks_of_any_size_give_the_same_logits_and_tokens(demo, tokens, policy):
    model = demo[0]
    tokens = tokens[:, :160]
    expected, reference = None, None
    for chunk in (1, 7, 160):
        caches = make_prompt_cache(model, 64, policy=policy)
        logits = tiny.feed(model, tokens, caches, chunk)
        kept = [np.array(c.positions) for c in caches]
        if expected is None:
            expected, reference = logits, kept
        assert mx.abs(logits - expected).max().item() < 1e-3
        assert all(map(np.array_equal, kept, reference))


@pytest.mark.parametrize("policy", POLICIES)
def test_with_room_for_all_logits_are_those_of_mlx_lm(demo, tokens, policy):
    model = demo[0]
    expected = model(tokens, cache=mlx_lm_cache.make_prompt_cache(model))
    got = model(tokens, cache=make_prompt_cache(model, 400, policy=policy))
    assert mx.abs(got - expected).max().item() < 1e-3


def test_mlx_lm_generates_with_the_cache(demo, text):
    model, tokenizer = demo
    caches = make_prompt_cache(model, 48)
    answer = generate(model, tokenizer, text[:1200], max_tokens=12, prompt_cache=caches)
    assert answer.strip()
    assert {c.size() for c in caches} == {48}
    assert {c.offset for c in caches} == {len(tokenizer.encode(text[:1200])) + 12}
