"""Tokens taken back leave no trace, as far back as the journal goes."""

import copy
import sys

import mlx.core as mx
import numpy as np
import pytest
import tiny
import zoo
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import cache as mlx_lm_cache
from test_cache import CASES, EXTRA

from tova_mlx import convert, make_prompt_cache
from tova_mlx.errors import CacheStateError, OptionError
from tova_mlx.hooks import trimming

LIMIT = 12


@pytest.fixture(scope="module")
def model():
    return tiny.make()


def read(model, tokens, sizes, policy="tova", limit=LIMIT, **options):
    caches = make_prompt_cache(model, limit, policy=policy, **options)
    if tokens.shape[1]:
        tiny.feed(model, tokens, caches, sizes)
    return caches


def assert_same(model, one, other, rest):
    """The same tokens are held, and nothing that follows can tell them apart."""
    for a, b in zip(one, other, strict=True):
        assert (a.offset, a.size()) == (b.offset, b.size())
        assert not a.offset or np.array_equal(a.positions, b.positions)
    got, want = (tiny.feed(model, rest, c, [1, 1, 1, 4, 1, 1]) for c in (one, other))
    assert mx.abs(got - want).max().item() < 1e-4
    for a, b in zip(one, other, strict=True):
        assert np.array_equal(a.positions, b.positions)


@pytest.mark.parametrize(("policy", "options"), CASES + EXTRA)
@pytest.mark.parametrize(
    "sizes",
    [[40], [10, 9, 9, 12], [19] + [1] * 21, [30, 5, 1, 1, 3], [1] * 40],
    ids=str,
)
def test_trim_is_as_if_the_tokens_had_not_been(model, policy, options, sizes):
    tokens, rest = tiny.tokens(40), tiny.tokens(9, seed=9)
    caches = read(model, tokens, sizes, policy, **options)
    for n in (1, 5, 16):
        twins = copy.deepcopy(caches)
        assert mlx_lm_cache.trim_prompt_cache(twins, n) == n
        fresh = read(model, tokens[:, : 40 - n], 1, policy, **options)
        assert_same(model, twins, fresh, rest)


@pytest.mark.parametrize(("policy", "options"), CASES + EXTRA)
@pytest.mark.parametrize("sizes", [[15], [1] * 15, [8, 7]], ids=str)
def test_trim_crosses_the_first_eviction(model, policy, options, sizes):
    tokens, rest = tiny.tokens(15), tiny.tokens(9, seed=9)
    caches = read(model, tokens, sizes, policy, **options)
    for n in (2, 3, 7, 15):
        twins = copy.deepcopy(caches)
        assert mlx_lm_cache.trim_prompt_cache(twins, n) == n
        fresh = read(model, tokens[:, : 15 - n], 1, policy, **options)
        assert_same(model, twins, fresh, rest)


@pytest.mark.parametrize(("policy", "options"), CASES + EXTRA)
def test_trims_follow_each_other(model, policy, options):
    tokens = tiny.tokens(60)
    caches = read(model, tokens[:, :30], [25, 5], policy, **options)
    seen = list(range(30))
    next_token = 30
    # To places that other tokens have taken since, too.
    for back, chunk in [(3, 4), (2, 1), (0, 1), (3, 5), (5, 1), (6, 3)]:
        assert mlx_lm_cache.trim_prompt_cache(caches, back) == back
        seen = seen[: len(seen) - back] + list(range(next_token, next_token + chunk))
        tiny.feed(model, tokens[:, next_token : next_token + chunk], caches, chunk)
        next_token += chunk
    fresh = read(model, tokens[:, mx.array(seen)], 1, policy, **options)
    assert_same(model, caches, fresh, tiny.tokens(9, seed=9))


@pytest.mark.parametrize("policy", ["full", "window", "streaming", "tova"])
def test_any_number_can_be_taken_back_before_the_first_eviction(model, policy):
    tokens = tiny.tokens(30)
    caches = read(model, tokens[:, :20], 20, policy, limit=24)
    assert all(c.is_trimmable() for c in caches)
    assert mlx_lm_cache.trim_prompt_cache(caches, 18) == 18
    fresh = read(model, tokens[:, :2], 2, policy, limit=24)
    assert_same(model, caches, fresh, tokens[:, 20:29])


@pytest.mark.parametrize("policy", ["h2o", "vatp", "fade"])
def test_what_a_policy_remembers_is_taken_back_before_the_first_eviction(model, policy):
    tokens = tiny.tokens(30)
    caches = read(model, tokens[:, :20], 20, policy, limit=24)
    # As far as the journal goes: the scores before that are lost.
    assert not any(c.is_trimmable() or c.can_trim(17) for c in caches)
    assert mlx_lm_cache.trim_prompt_cache(caches, 17) == 0
    assert mlx_lm_cache.trim_prompt_cache(caches, 16) == 16
    fresh = read(model, tokens[:, :4], 4, policy, limit=24)
    assert_same(model, caches, fresh, tokens[:, 20:29])


@pytest.mark.parametrize("policy", ["window", "streaming", "h2o", "tova", "fade"])
def test_what_the_journal_does_not_hold_is_refused(model, policy):
    tokens = tiny.tokens(40)
    caches = read(model, tokens, 8, policy)
    assert not caches[0].is_trimmable()
    before = [np.array(c.positions) for c in caches]
    assert mlx_lm_cache.trim_prompt_cache(caches, 20) == 0
    with pytest.raises(CacheStateError, match=r"20 tokens.*journal=16"):
        caches[0].trim(20)
    assert all(map(np.array_equal, [c.positions for c in caches], before))
    assert caches[0].offset == 40
    off = read(model, tokens, [39, 1], policy, journal=0)
    assert not off[0].can_trim(2)
    assert off[0].nbytes < caches[0].nbytes


def test_a_chunk_cut_once_cannot_be_taken_back(model):
    tokens = tiny.tokens(40)
    caches = read(model, tokens, [30, 10], prefill="once")
    assert not caches[0].can_trim(1)
    tiny.feed(model, tokens[:, :5], caches, 1)
    assert caches[0].can_trim(5)
    assert not caches[0].can_trim(6)


@pytest.mark.parametrize("journal", [-1, 1.5, True, "x"])
def test_a_journal_that_cannot_be_is_refused(model, journal):
    with pytest.raises(OptionError, match="journal="):
        make_prompt_cache(model, LIMIT, journal=journal)


@pytest.mark.parametrize(("policy", "options"), CASES)
def test_bytes_with_a_journal_stay_and_are_in_the_bound(model, policy, options):
    if policy == "full":
        return
    caches = read(model, tiny.tokens(80), [30] + [1] * 50, policy, **options)
    for c in caches:
        assert c.nbytes == c.max_nbytes
    tiny.feed(model, tiny.tokens(30), caches, [7, 1, 1, 21])
    assert all(c.nbytes <= c.max_nbytes for c in caches)


@pytest.mark.parametrize("policy", ["tova", "streaming", "fade"])
def test_speculative_decoding_gives_the_tokens_of_greedy_decoding(model, policy):
    draft = tiny.make(seed=3)
    model, prompt = tiny.make(), tiny.tokens(50)[0]
    convert(model, 20, policy=policy)
    convert(draft, 14)
    plain = [t for t, _ in generate_step(prompt, model, max_tokens=40)]
    both = model.make_cache() + draft.make_cache()
    steps = speculative_generate_step(
        prompt, model, draft, num_draft_tokens=4, max_tokens=40, prompt_cache=both
    )
    rows = list(steps)
    assert [int(t) for t, *_ in rows] == [int(t) for t in plain]
    assert both[0].offset >= 50 + 38


def test_speculative_decoding_past_the_journal_is_refused_aloud(model):
    draft, model = tiny.make(seed=3), tiny.make()
    convert(model, 20, journal=2)
    convert(draft, 20, journal=2)
    steps = speculative_generate_step(
        tiny.tokens(50)[0], model, draft, num_draft_tokens=8, max_tokens=60
    )
    with pytest.raises(CacheStateError, match="Convert with journal="):
        list(steps)


def test_mlx_lms_trimming_can_be_put_back():
    generate = sys.modules["mlx_lm.generate"]
    trimming.install()
    assert mlx_lm_cache.trim_prompt_cache is trimming.trim_prompt_cache
    assert generate.trim_prompt_cache is trimming.trim_or_raise
    own = mlx_lm_cache.KVCache()
    own.update_and_fetch(mx.zeros((1, 2, 5, 4)), mx.zeros((1, 2, 5, 4)))
    assert mlx_lm_cache.trim_prompt_cache([own], 3) == 3
    trimming.uninstall()
    assert generate.trim_prompt_cache is mlx_lm_cache.trim_prompt_cache
    assert mlx_lm_cache.trim_prompt_cache is not trimming.trim_prompt_cache
    trimming.install()


def test_caches_in_a_list_are_taken_back_together_or_not_at_all():
    model = zoo.make("longcat_flash")
    tokens = tiny.tokens(40)
    caches = make_prompt_cache(model, LIMIT)
    first = tiny.feed(model, tokens, caches, [30] + [1] * 10)
    assert mlx_lm_cache.trim_prompt_cache(caches, 3) == 3
    again = tiny.feed(model, tokens[:, -3:], caches, 1)
    assert mx.abs(again - first[:, -3:]).max() < 1e-4
    assert mlx_lm_cache.trim_prompt_cache(caches, 20) == 0
    assert caches[0][0].offset == 40
    with pytest.raises(CacheStateError, match="20 drafted tokens"):
        trimming.trim_or_raise(caches, 20)
    # A state that cannot be taken back keeps the whole list as it is.
    caches = make_prompt_cache(hybrid := zoo.make("falcon_h1"), LIMIT)
    tiny.feed(hybrid, tokens, caches, [30] + [1] * 10)
    assert mlx_lm_cache.trim_prompt_cache(caches, 3) == 0
    assert caches[0][1].offset == 40


@pytest.mark.parametrize(("policy", "options"), CASES + EXTRA)
@pytest.mark.parametrize("sizes", [[40], [39, 1], [10], [10, 1], []], ids=str)
def test_to_take_back_nothing_changes_nothing(model, policy, options, sizes):
    tokens, rest = tiny.tokens(sum(sizes)), tiny.tokens(9, seed=9)
    caches = read(model, tokens, sizes, policy, **options)
    same = copy.deepcopy(caches)
    for n in (0, -1, -40):
        assert [c.trim(n) for c in caches] == [0, 0, 0]
        assert all(c.can_trim(n) for c in caches)
        assert mlx_lm_cache.trim_prompt_cache(caches, n) == 0
    assert_same(model, caches, same, rest)


@pytest.mark.parametrize("policy", ["tova", "h2o", "fade", "streaming"])
@pytest.mark.parametrize("num_draft_tokens", [0, 1, 5])
def test_a_model_that_drafts_for_itself_is_always_right(policy, num_draft_tokens):
    model, prompt = tiny.make(), tiny.tokens(50)[0]
    convert(model, 20, policy=policy)
    plain = [int(t) for t, _ in generate_step(prompt, model, max_tokens=41)]
    steps = list(
        speculative_generate_step(
            prompt, model, model, num_draft_tokens=num_draft_tokens, max_tokens=41
        )
    )
    assert [int(t) for t, *_ in steps] == plain
    drafted = sum(from_draft for *_, from_draft in steps)
    # All but the token that comes after each run of drafts.
    assert drafted == 41 - 41 // (num_draft_tokens + 1)


def test_drafts_are_accepted_in_a_cache_that_has_evicted():
    model, prompt = tiny.make(), tiny.tokens(50)[0]
    convert(model, 20)
    both = model.make_cache() + model.make_cache()
    tiny.feed(model, tiny.tokens(60, seed=8), both[:3], 60)
    tiny.feed(model, tiny.tokens(60, seed=8), both[3:], 60)
    again = copy.deepcopy(both[:3])
    steps = speculative_generate_step(
        prompt, model, model, max_tokens=12, prompt_cache=both
    )
    got = [int(t) for t, *_ in steps]
    want = generate_step(prompt, model, max_tokens=12, prompt_cache=again)
    assert got == [int(t) for t, _ in want]
    convert(model, 20, journal=0)
    off = model.make_cache()
    tiny.feed(model, tiny.tokens(60, seed=8), off, 60)
    steps = speculative_generate_step(prompt, model, model, prompt_cache=off + off)
    with pytest.raises(ValueError, match="trimmable"):
        next(steps)


@pytest.mark.parametrize(("policy", "options"), CASES + EXTRA)
def test_after_all_was_taken_back_a_cache_is_as_new(model, policy, options):
    tokens = tiny.tokens(10)
    caches = read(model, tokens, [9, 1], policy, **options)
    assert mlx_lm_cache.trim_prompt_cache(caches, 10) == 10
    assert all(c.empty() and c.nbytes == 0 for c in caches)
    fresh = read(model, tiny.tokens(0), [], policy, **options)
    assert_same(model, caches, fresh, tiny.tokens(30, seed=4))
