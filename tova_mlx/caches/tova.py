"""The paper's cache, and which class a rule's cache is of."""

from ..policies import Granularity
from .layer import PolicyKVCache
from .options import JOURNAL, CacheOptions


class TOVACache(PolicyKVCache):
    """A key/value cache of one layer that keeps the tokens most attended last.

    After each token has attended, the token that it attended to least, on the mean
    over the heads, is evicted. Nothing else is protected: not the first tokens, not the
    newest.

    Args:
        max_size: tokens kept (the paper's multi-state size), at least 1.
        granularity: "layer", one victim per layer (the paper's best), or "head", one
            per KV head by the mean over its query heads.
        n_sinks, n_recent: first and newest tokens protected, inside `max_size`.
        memory: share of the old score kept per token, 0 to 1; 0 is the paper's.
        value_weighted: whether a weight counts times the norm of the token's value.
        prefill: "stepwise" (exact token by token) or "once" (see PolicyKVCache).
        journal: newest tokens that can be taken back (see PolicyKVCache).
        kv_bits, kv_group_size: quantised keys and values (see PolicyKVCache).

    Raises:
        OptionError: a value that cannot work.

    Source: "Transformers are Multi-State RNNs", arXiv 2401.06104, section 3.
    Differs from the source: stepwise prefill, granularity "head", `n_sinks`,
    `n_recent`, `memory` and `value_weighted`.
    """

    def __init__(
        self,
        max_size: int,
        *,
        granularity: Granularity = "layer",
        n_sinks: int = 0,
        n_recent: int = 0,
        memory: float = 0.0,
        value_weighted: bool = False,
        prefill: str = "stepwise",
        journal: int = JOURNAL,
        kv_bits: int | tuple[int, int] | None = None,
        kv_group_size: int = 64,
    ):
        super().__init__(
            max_size,
            "tova",
            granularity=granularity,
            n_sinks=n_sinks,
            n_recent=n_recent,
            memory=memory,
            value_weighted=value_weighted,
            prefill=prefill,
            journal=journal,
            kv_bits=kv_bits,
            kv_group_size=kv_group_size,
        )


def new_cache(options: CacheOptions) -> PolicyKVCache:
    """Return an empty cache made with resolved options."""
    kind = TOVACache if options.rule.policy == "tova" else PolicyKVCache
    return kind.of(options)
