"""Tables as plain text."""

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


def is_number(cell: object) -> bool:
    """Whether a cell reads as a figure, with or without its unit."""
    text = str(cell).replace(",", "").replace("%", "").replace("×", "").replace("–", "0").strip()
    try:
        float(text.split(" ")[0] if text else "0")
    except ValueError:
        return False
    return True
