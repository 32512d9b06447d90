"""What a cache cannot be right with: refused, with the reason and the next move."""

from typing import Any

from .errors import CacheStateError, OptionError, UnsupportedModelError
from .packed import Rows
from .policies import Rule


def check_options(rule: Rule, prefill: Any, journal: Any) -> None:
    """Raises OptionError."""
    if prefill not in ("stepwise", "once"):
        raise OptionError(
            f"{rule.policy}: prefill={prefill!r} is not known. "
            "Use 'stepwise' or 'once'."
        )
    if prefill == "once" and not rule.reads_attention:
        raise OptionError(
            f"{rule.policy} does not read prefill='once': it cuts by attention. "
            "Leave it out."
        )
    if isinstance(journal, bool) or not isinstance(journal, int) or journal < 0:
        raise OptionError(
            f"{rule.policy}: journal={journal!r} is not a whole number of tokens. "
            "Use 0 or more."
        )


def check_rows(rule: Rule, held: Rows | None, keys: Rows) -> None:
    """New keys must fit those held. Raises CacheStateError."""
    if held is None:
        return
    if (keys.shape[:2], keys.shape[3]) != (held.shape[:2], held.shape[3]):
        raise CacheStateError(
            f"{rule.policy}: keys {list(keys.shape)} do not fit a cache of "
            f"{list(held.shape)}. Use a new cache for another model or batch."
        )


def check_values(module: str, rule: Rule, stored: Rows | None, values: Rows) -> None:
    """Head by head, and by value, only if the stored heads are the attended.

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


def unseen(module: str, policy: str) -> UnsupportedModelError:
    """What to raise for a model that attends by itself."""
    return UnsupportedModelError(
        f"{module} computes its own attention, so {policy} cannot see its "
        "queries. Use policy window or streaming, or another model."
    )


def windowed(rule: Rule, window_size: int, tokens: int) -> UnsupportedModelError:
    """What to raise for a layer that wants a window after as many tokens."""
    return UnsupportedModelError(
        f"{rule.policy}: a layer wants a sliding window of {window_size} tokens, which "
        f"a bounded cache of other tokens cannot give. Use max_size={tokens} or more, "
        "or leave this layer its own cache."
    )


def attended_again(rule: Rule) -> UnsupportedModelError:
    """What to raise for a second attention to keys that are not known to be shared."""
    return UnsupportedModelError(
        "A layer attends a second time to one cache update, which "
        f"{rule.policy} follows only in caches that `make_prompt_cache` or `convert` "
        "made for a model that shares keys and values. Use them, or policy window or "
        "streaming."
    )
