"""Plain text tables."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[object]], left: Sequence[int] = (0,)) -> str:
    """Columns with two spaces between them; those in `left` begin at the left, all others end at the right."""
    lines = [list(map(str, line)) for line in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def milliseconds(seconds: float) -> str:
    """Three significant digits or so."""
    return f"{seconds * 1e3:.2f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def byte_unit(largest: float) -> tuple[str, float]:
    """The unit in which a column of sizes is best read, and its bytes."""
    return ("GiB", 2.0**30) if largest >= 2**29 else ("MiB", 2.0**20)


def size(number: float, unit: float) -> str:
    """A number of bytes in a unit: one digit after the point; two below one, none if nothing."""
    value = number / unit
    return "0" if value == 0 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"
