"""Tables of plain text."""

from collections.abc import Iterable, Sequence


def table(rows: Iterable[Sequence[object]], columns: str) -> str:
    """Align the cells of rows in columns, two spaces apart.

    columns: of each "<" or ">", and how wide it is at least, as in "<9 >5 <".
    """
    sides = [(column[0], int(column[1:] or 0)) for column in columns.split()]
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [
        max([least, *(len(row[i]) for row in cells)])
        for i, (_, least) in enumerate(sides)
    ]
    how = "  ".join(
        f"{{:{side}{width}}}" for (side, _), width in zip(sides, widths, strict=True)
    )
    return "\n".join(how.format(*row).rstrip() for row in cells)
