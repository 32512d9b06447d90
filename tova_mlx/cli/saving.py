"""What a bounded cache saves, in a line: the last that generate and chat say."""

from typing import Any


def saving(model: Any, caches: list[Any]) -> str:
    """Say what caches of a model take, and what mlx-lm's own would take."""
    from ..models.conversion import default_bytes
    from ..models.report import describe

    totals: dict[str, Any] = describe(caches).totals
    held, seen, now = (totals[k] for k in ("tokens_held", "tokens_seen", "bytes_now"))
    unbounded = default_bytes(model, seen)
    less = "nothing yet"
    if unbounded > now:
        less = f"{mebibytes(unbounded - now)} of {mebibytes(unbounded)}"
    archive = ""
    if totals["archived"]:
        archive = f", its archive {mebibytes(totals['archive_bytes'])}"
    return (
        f"saved: {less}; the cache takes {mebibytes(now)}{archive} and holds {held:,} "
        f"of {seen:,} tokens per layer"
    )


def mebibytes(n: int) -> str:
    return f"{n / 2**20:,.1f} MiB"
