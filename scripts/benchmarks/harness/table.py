"""Tables: columns for a terminal, and Markdown for a page."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

Row = Sequence[str]


def columns(head: Row, rows: Sequence[Row]) -> str:
    """Lines of equal columns, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = []
    for row in (head, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(head: Row, rows: Sequence[Row], left: int = 1) -> list[str]:
    """Lines of a Markdown table: the first `left` columns to the left, the others to the right."""
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)]


def paragraph(text: str, bullet: str = "") -> list[str]:
    """Lines of at most 110 columns; with `bullet`, which begins the first, an item of a list."""
    return textwrap.wrap(
        text,
        110,
        initial_indent=bullet,
        subsequent_indent=" " * len(bullet),
        break_on_hyphens=False,  # a page would show a space behind the hyphen
        break_long_words=False,  # links
    )


def number(value: float) -> str:
    """Two or three digits that matter: 0.0004, 0.024, 1.24, 15.4, 57, 1,284."""
    if value < 0.1:
        return f"{value:.1g}" if value < 0.01 else f"{value:.2g}"
    if value < 2:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 19.95 else f"{value:,.0f}"


def ms(seconds: float) -> str:
    """Seconds as milliseconds."""
    return number(seconds * 1e3)


def page(lines: Sequence[str]) -> str:
    """A page of lines: what is longer than 110 columns is broken, except tables, headings and pictures."""
    return (
        "\n".join(
            part
            for line in lines
            for part in ([line] if line.startswith(("|", "#", "![", "<")) else broken(line))
        )
        + "\n"
    )


def broken(text: str) -> list[str]:
    """Every line of the text, the longer ones broken at spaces."""
    return [part for line in text.split("\n") for part in (paragraph(line) if len(line) > 110 else [line])]
