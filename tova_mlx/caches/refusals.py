"""What a cache cannot be right with: refused, with the reason and the next move."""

from typing import Any

from ..errors import CacheStateError, UnsupportedModelError
from ..policies import Rule
from ..storage.entries import Entries


def check_entries(
    rule: Rule,
    held: Entries | None,
    keys: Entries,
    held_values: Entries | None = None,
    values: Entries | None = None,
) -> None:
    """Check that new entries fit those held, and each other. Raises CacheStateError."""
    if values is not None and values.shape[:3] != keys.shape[:3]:
        raise CacheStateError(
            f"{rule.policy}: values {list(values.shape)} do not belong to keys "
            f"{list(keys.shape)}. Give as many of both."
        )
    pairs = {"keys": (held, keys), "values": (held_values, values)}
    for name, (there, new) in pairs.items():
        if there is None or new is None:
            continue
        if (new.shape[:2], new.shape[3]) != (there.shape[:2], there.shape[3]):
            raise CacheStateError(
                f"{rule.policy}: {name} {list(new.shape)} do not fit a cache of "
                f"{list(there.shape)}. Use a new cache for another model or batch."
            )


def check_values(
    module: str, rule: Rule, stored: Entries | None, values: Entries
) -> None:
    """Check that a model attends to the heads that it stores, where that matters.

    Raises UnsupportedModelError.
    """
    if stored is None or not (rule.per_head or rule.value_weighted):
        return
    if (stored.shape[1], stored.shape[3]) == (values.shape[1], values.shape[3]):
        return
    if rule.value_weighted:
        raise UnsupportedModelError(
            f"{module} attends to other values than it stores (latents, or repeated "
            f"heads), so {rule.policy} cannot weigh them. Use value_weighted=False, or "
            "policy tova."
        )
    if stored.shape[1] > 1:
        raise UnsupportedModelError(
            f"{module} repeats its KV heads in an order of its own, so {rule.policy} "
            "cannot choose per head. Use granularity='layer'."
        )


def check_recall(
    module: str, stored: tuple[Entries, Entries], given: tuple[Entries, Entries]
) -> None:
    """Check that a model attends to the very keys and values that it stores.

    Raises UnsupportedModelError.
    """
    pairs = zip(stored, given, strict=True)
    if any((a.shape[1], a.shape[3]) != (b.shape[1], b.shape[3]) for a, b in pairs):
        raise UnsupportedModelError(
            f"{module} attends to other keys and values than it stores (latents, or "
            "repeated heads), so evicted ones cannot be brought back. Use recall=0, or "
            "another model."
        )


def check_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Check that caches were made with the same options. Raises CacheStateError."""
    for name, mine in one.items():
        if mine != other[name]:
            raise CacheStateError(
                f"{one['rule'].policy}: caches of different options ({name}: {mine} "
                f"and {other[name]}) cannot be one batch. Convert the model once, then "
                "make all of them."
            )


def unseen(module: str, policy: str) -> UnsupportedModelError:
    """Return what to raise for a model that attends by itself."""
    return UnsupportedModelError(
        f"{module} computes its own attention, so {policy} cannot see its "
        "queries. Use policy window or streaming, or another model."
    )


def unattended(
    module: str, rule: Rule, before: int, stored: int
) -> UnsupportedModelError | CacheStateError:
    """Return what to raise if `stored` tokens after `before` were never attended to."""
    if before:
        return CacheStateError(
            f"{rule.policy}: the last forward was interrupted after a layer had stored "
            f"{stored} tokens and before it attended to them. Take them back with "
            f"trim_prompt_cache(cache, {stored}), or start with new caches."
        )
    return UnsupportedModelError(
        f"{module} stored {stored} tokens and did not attend to them where "
        f"{rule.policy} can see it: it computes its own attention, or its forward was "
        "interrupted. Use policy window or streaming, or another model; after an "
        "interruption new caches."
    )


def windowed(rule: Rule, window_size: int, tokens: int) -> UnsupportedModelError:
    """Return what to raise for a layer that wants a window after as many tokens."""
    return UnsupportedModelError(
        f"{rule.policy}: a layer wants a sliding window of {window_size} tokens, which "
        f"a bounded cache of other tokens cannot give. Use max_size={tokens} or more, "
        "or leave this layer its own cache."
    )


def unrotated(module: str, why: str) -> UnsupportedModelError:
    """Return what to raise for a model whose positions cannot be renumbered."""
    return UnsupportedModelError(
        f"{module} {why}, so the tokens held cannot be given other positions. Use "
        "positions='original', or another model."
    )


def attended_again(rule: Rule) -> UnsupportedModelError:
    """Return what to raise for a second attention to keys not known to be shared."""
    return UnsupportedModelError(
        "A layer attends a second time to one cache update, which "
        f"{rule.policy} follows only in caches that `make_prompt_cache` or `convert` "
        "made for a model that shares keys and values. Use them, or policy window or "
        "streaming."
    )
