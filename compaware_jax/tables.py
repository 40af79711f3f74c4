"""Tables as plain text and as Markdown."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> str:
    """Rows as aligned text; columns whose cells are all numbers are set flush right."""
    table = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for column, name in enumerate(header):
        numeric = all(is_number(row[column]) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    # Wide enough for any row: a table that wraps cannot be read or searched.
    console = Console(file=io.StringIO(), width=1000, color_system=None, markup=False)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows as a Markdown table; columns whose cells are all numbers are set flush right."""
    numeric = [all(is_number(row[column]) for row in rows) for column in range(len(header))]
    lines = [header, ["--:" if right else "---" for right in numeric], *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def is_number(cell: object) -> bool:
    """Whether a cell reads as a figure, with or without its unit."""
    figure, *unit = str(cell).split(" ± ")[0].replace(",", "").strip("%×–~ ").split(" ") or [""]
    if len(unit) > 1 or len("".join(unit)) > 5:
        return False
    try:
        float(figure.strip("%×") or "0")
    except ValueError:
        return False
    return True
