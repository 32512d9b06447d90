"""What a bounded cache saves, in a line: the last that generate and chat say."""

from typing import Any


def saving(model: Any, caches: list[Any]) -> str:
    """Say what caches of a model take in memory, and what mlx-lm's own would take."""
    from ..hooks.layers import leaves
    from ..models.conversion import default_bytes
    from ..models.report import describe

    totals: dict[str, Any] = describe(caches).totals
    held, seen, now = (totals[k] for k in ("tokens_held", "tokens_seen", "bytes_now"))
    taken, parts = now, [f"the cache takes {mebibytes(now)}"]
    if totals["archived"]:
        on_disk = any(getattr(c, "archives_on_disk", False) for c in leaves(caches))
        archive = totals["archive_bytes"]
        parts.append(f"its archive {mebibytes(archive)}{' on disk' if on_disk else ''}")
        taken += 0 if on_disk else archive
    unbounded = default_bytes(model, seen)
    less = "nothing yet"
    if unbounded > taken:
        less = f"{mebibytes(unbounded - taken)} of {mebibytes(unbounded)}"
    return (
        f"saved: {less}; {', '.join(parts)}; {held:,} of {seen:,} tokens are held per "
        "layer"
    )


def mebibytes(n: int) -> str:
    return f"{n / 2**20:,.1f} MiB"
