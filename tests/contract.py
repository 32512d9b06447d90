"""What every model must do with bounded caches, and what came of it for one family."""

from dataclasses import dataclass

import mlx.core as mx
import tiny
import zoo
from mlx_lm.models import cache as mlx_lm_cache

from tova_mlx import PolicyKVCache, make_prompt_cache
from tova_mlx.errors import UnsupportedModelError

LENGTH, LIMIT = 40, 10
CHUNKS = (1, 7, LENGTH)


@dataclass(frozen=True)
class Outcome:
    """How many of a model's caches are ours, of how many; or why it is refused."""

    bounded: int = 0
    caches: int = 0
    reason: str | None = None


def outcome(name: str, policy: str = "tova") -> Outcome:
    """Try a family: with room for everything, then with a limit and several chunkings.

    Raises AssertionError if it breaks the contract: with nothing evicted the logits
    are those of the model's own caches; chunks of any size give the same logits and
    keep the same tokens; every cache has seen what was fed and holds what it may.
    """
    if name in zoo.BROKEN:
        return Outcome(reason=zoo.BROKEN[name])
    model = zoo.make(name)
    mx.random.seed(1)
    tokens = mx.random.randint(1, zoo.VOCABULARY, (1, LENGTH))
    own = tiny.feed(model, tokens, mlx_lm_cache.make_prompt_cache(model), 7)
    logits, kept = {}, {}
    try:
        roomy = make_prompt_cache(model, LENGTH, policy=policy)
        all_kept = tiny.feed(model, tokens, roomy, 7)
        for chunk in CHUNKS:
            caches = make_prompt_cache(model, LIMIT, policy=policy)
            logits[chunk] = tiny.feed(model, tokens, caches, chunk)
            kept[chunk] = ours(caches)
    except UnsupportedModelError as error:
        return Outcome(reason=str(error))
    for cache in ours(roomy):
        assert (cache.offset, cache.size()) == (LENGTH, LENGTH), name
    assert _distance(own, all_kept) < 1e-3, f"{name}: nothing was evicted"
    one = CHUNKS[0]
    for chunk in CHUNKS:
        apart = _distance(logits[one], logits[chunk])
        assert apart < 1e-3, f"{name}: chunks of {chunk} are {apart} apart"
        for a, b in zip(kept[one], kept[chunk], strict=True):
            assert (b.offset, b.size()) == (LENGTH, LIMIT), name
            assert mx.array_equal(a.positions, b.positions), f"{name}: other tokens"
    if kept[one]:
        assert _distance(own, logits[one]) > 1e-3, f"{name}: the limit does nothing"
    return Outcome(len(kept[one]), len(list(leaves(roomy))))


def leaves(caches):
    """The caches in a list, those inside of a `CacheList` too."""
    for cache in caches:
        yield from leaves(cache.caches) if hasattr(cache, "caches") else (cache,)


def ours(caches):
    """Our caches in a list that a layer has used."""
    used = (c for c in leaves(caches) if isinstance(c, PolicyKVCache))
    return [c for c in used if not c.empty()]


def _distance(a, b):
    return mx.abs(a - b).max().item()
