"""What each layer holds: one row per layer, and the totals."""

from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache

from ..caches.batch import BatchPolicyKVCache
from ..caches.layer import PolicyKVCache
from ..hooks.layers import leaves, seen, total
from ..storage.entries import nbytes
from ..tables import table

OURS = (PolicyKVCache, BatchPolicyKVCache)


@dataclass(frozen=True)
class Row:
    """A layer. Tokens and bytes; `bytes_at_most` None: without limit or not known.

    recalled: evicted tokens that are attended to all the same; archived: how many went
    to an archive, those that a limit has dropped too. Not part of the others.
    """

    layer: int
    kind: str
    policy: str | None
    tokens_held: int
    tokens_seen: int
    bytes_now: int
    bytes_at_most: int | None
    recalled: int = 0
    archived: int = 0
    archive_bytes: int = 0


@dataclass(frozen=True)
class Report:
    """The rows of `describe`; `str()` is a table, `to_dict()` is JSON-ready."""

    rows: tuple[Row, ...]

    @property
    def totals(self) -> dict[str, int | None]:
        """Most tokens held and seen in a layer; bytes of all layers."""
        return {
            "layers": len(self.rows),
            "tokens_held": max((r.tokens_held for r in self.rows), default=0),
            "tokens_seen": max((r.tokens_seen for r in self.rows), default=0),
            "bytes_now": sum(r.bytes_now for r in self.rows),
            "bytes_at_most": total(r.bytes_at_most for r in self.rows),
            "recalled": max((r.recalled for r in self.rows), default=0),
            "archived": max((r.archived for r in self.rows), default=0),
            "archive_bytes": sum(r.archive_bytes for r in self.rows),
        }

    def to_dict(self) -> dict[str, Any]:
        return {"layers": [asdict(r) for r in self.rows], "totals": self.totals}

    def __str__(self) -> str:
        heads = ["layer", "kind", "policy", "held", "seen", "bytes now", "at most"]
        lines = [
            [
                r.layer,
                r.kind,
                r.policy or "–",
                r.tokens_held,
                r.tokens_seen,
                f"{r.bytes_now:,}",
                _bytes(r.bytes_at_most),
            ]
            for r in self.rows
        ]
        t = self.totals
        held, seen = t["tokens_held"], t["tokens_seen"]
        now, most = _bytes(t["bytes_now"]), _bytes(t["bytes_at_most"])
        last = ["all", "", "", held, seen, now, most]
        rows, form = [heads, *lines, last], "> < < > > > >"
        if t["archived"]:
            form += " > > >"
            heads += ["recalled", "archived", "archive bytes"]
            for line, of in zip(rows[1:], [*self.rows, None], strict=True):
                found = t if of is None else asdict(of)
                line += [found["recalled"], found["archived"]]
                line.append(_bytes(found["archive_bytes"]))
        return table(rows, form)


def describe(cache_or_model: Any) -> Report:
    """What each layer holds, and the bytes that it can reach.

    A list of caches is described as it is; bounds are known once it was used. A model
    is described by the caches that it makes itself, after one token that is traced
    and not computed.
    """
    if isinstance(cache_or_model, nn.Module):
        caches = mlx_lm_cache.make_prompt_cache(cache_or_model)
        bounds = [bound(c) for c in trace(cache_or_model, caches)]
        caches = mlx_lm_cache.make_prompt_cache(cache_or_model)
    else:
        caches = list(cache_or_model)
        bounds = [bound(c) for c in caches]
    return Report(
        tuple(
            _row(i, c, b) for i, (c, b) in enumerate(zip(caches, bounds, strict=True))
        )
    )


def trace(model: nn.Module, caches: list[Any]) -> list[Any]:
    """Give empty caches their shapes: one token's graph is built, not evaluated."""
    model(mx.zeros((1, 1), mx.int32), cache=caches)
    return caches


def bytes_per_token(caches: list[Any]) -> int:
    """Bytes that a token takes in unbounded caches of these shapes, all layers."""
    entries: list[Any] = [
        getattr(c, name, None) for c in leaves(caches) for name in ("keys", "values")
    ]
    return sum(nbytes(e) // e.shape[2] for e in entries if e is not None)


def unbounded_bytes(caches: list[Any], tokens: int) -> int:
    """Bytes that mlx-lm's own caches take after so many tokens, all layers.

    caches: of one token, as `trace` leaves them. One that mlx-lm bounds itself, such as
    a sliding window's, counts for no more than its limit.
    """

    def taken(cache: Any) -> int:
        limit, grown = bound(cache), tokens * bytes_per_token([cache])
        if not grown or limit is None:
            return limit or grown
        return min(limit, grown)

    return sum(map(taken, leaves(caches)))


def _row(layer: int, cache: Any, bound: int | None) -> Row:
    parts = list(leaves([cache]))
    policies = [c.rule.policy for c in parts if isinstance(c, OURS)]
    return Row(
        layer=layer,
        kind=" + ".join(type(c).__name__ for c in parts),
        policy=policies[0] if policies else None,
        tokens_held=max(int(c.size()) if hasattr(c, "size") else 0 for c in parts),
        tokens_seen=max(_seen(c) for c in parts),
        bytes_now=sum(0 if c.empty() else _bytes_of(c) for c in parts),
        bytes_at_most=bound,
        recalled=max(getattr(c, "recalled", 0) for c in parts),
        archived=max(getattr(c, "archived", 0) for c in parts),
        archive_bytes=sum(getattr(c, "archive_nbytes", 0) for c in parts),
    )


def _bytes_of(cache: Any) -> int:
    """Bytes of all but an archive."""
    if isinstance(cache, PolicyKVCache):
        return cache.slots.nbytes
    return int(cache.nbytes)


def _seen(cache: Any) -> int:
    """Tokens; of the row that has seen most, if there are several."""
    n = seen(cache)
    return int(n.max()) if isinstance(n, mx.array) else int(n or 0)


def bound(cache: Any) -> int | None:
    """Return the bytes that a cache can reach; None: no limit, or not known yet."""
    if hasattr(cache, "caches"):
        return total(map(bound, cache.caches))
    if cache.empty():
        return None
    if isinstance(cache, OURS):
        return cache.max_nbytes
    if isinstance(cache, mlx_lm_cache.RotatingKVCache) and cache.keys is not None:
        return int(cache.nbytes) // cache.keys.shape[2] * cache.max_size
    if isinstance(cache, mlx_lm_cache.ArraysCache):
        return int(cache.nbytes)
    return None


def _bytes(n: int | None) -> str:
    return "no limit" if n is None else f"{n:,}"
