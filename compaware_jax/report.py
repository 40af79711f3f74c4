"""Figures and a self-contained HTML page: what was kept, how it was found, what it costs.

Figure functions take results, not models, and return matplotlib figures; nothing is written but by
`save_figures` and `html_report`.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from compaware_jax.coupling.groups import Groups
from compaware_jax.surgery.plan import Plan
from compaware_jax.surgery.small_function import uncut, work_in
from compaware_jax.tables import is_number

# Okabe and Ito's palette: told apart by readers with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
WIDTH = 7.2

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def trade_off_figure(
    points: Mapping[str, Sequence[tuple[float, float]]],
    *,
    metric: str,
    cost: str = "parameters left (%)",
    ours: Sequence[str] = (),
) -> Figure:
    """A metric against the share of a cost that is left.

    Args:
      points: per series its (share in percent, metric) points.
      metric: name of the metric, with its unit.
      cost: name of the horizontal axis.
      ours: series that stand out; the others are drawn thin behind them.

    Returns:
      The figure.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, 4.6 if len(points) > 6 else 4.0))
        for number, (name, series) in enumerate(points.items()):
            x, y = np.array(sorted(series)).T
            colour = COLOURS[number % len(COLOURS)]
            marker = "osD^vPX"[number % 7]
            # Where colours begin anew, lines are dashed.
            line = ("-", "--", ":")[number // len(COLOURS) % 3] if len(set(x)) > 1 else "none"
            behind = bool(ours) and name not in ours
            axes.plot(
                x,
                y,
                color=colour,
                marker=marker,
                ls=line,
                lw=1.0 if behind else 2.5 if ours else 1.5,
                ms=5 if behind else 7,
                mec=None if marker in "+x" else "white",
                mew=0.6,
                label=name,
                zorder=2 + (line == "none") + 2 * (not behind),
            )
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        ticks = [t for t in (1, 2, 3, 5, 10, 20, 30, 50, 100) if low <= t <= high * 1.01]
        axes.set_xticks(ticks, [f"{t} %" for t in ticks])
        axes.minorticks_off()
        axes.set_xlabel(cost)
        axes.set_ylabel(metric)
        figure.legend(fontsize=9, ncols=3, loc="outside lower center")
    return figure


def kept_units_figure(groups: Groups, plan: Plan) -> Figure:
    """Units kept and removed, group by group, coloured by component."""
    names = [group.name for group in groups.groups]
    colours = component_colours(groups)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, 1.2 + 0.42 * len(names)))
        for row, (group, (_, kept, units)) in enumerate(zip(groups.groups, plan.counts, strict=True)):
            label = " + ".join(group.components)
            axes.barh(row, 100, color="0.92")
            axes.barh(row, 100 * kept / units, color=colours[label])
            axes.text(101, row, f"{kept} of {units}", va="center", fontsize=9)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlim(0, 118)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.set_xlabel("units kept (%)")
        axes.grid(axis="y", visible=False)
        handles = [Rectangle((0, 0), 1, 1, color=c) for c in colours.values()]
        figure.legend(handles, list(colours), fontsize=9, ncols=len(colours), loc="outside upper left")
    return figure


def component_colours(groups: Groups) -> dict[str, str]:
    """A colour per component, coupling groups being a component of their own."""
    labels = dict.fromkeys(" + ".join(group.components) for group in groups.groups)
    return {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}


def trajectory_figure(groups: Groups, share: np.ndarray, steps: int) -> Figure:
    """Kept share per group over the steps of the search.

    Args:
      groups: what can leave.
      share: shape (chunks, groups).
      steps: steps of the whole search.

    Returns:
      The figure.
    """
    at = np.linspace(0, steps, len(share) + 1)[1:]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, 4.0))
        for number, group in enumerate(groups.groups):
            axes.plot(
                at, 100 * share[:, number], color=COLOURS[number % 7], label=group.name,
                ls="-" if number < 7 else "--", lw=1.8,
            )  # fmt: skip
        axes.set_yscale("log")
        ticks = [t for t in (1, 2, 5, 10, 20, 50, 100) if t >= 70 * share.min()]
        axes.set_yticks(ticks, [f"{t} %" for t in ticks])
        axes.minorticks_off()
        axes.set_xlabel("search step")
        axes.set_ylabel("coefficient: share of the group kept")
        figure.legend(fontsize=9, ncols=3, loc="outside lower center")
    return figure


@dataclass(frozen=True)
class Section:
    """A part of a report: a heading, text, perhaps a table, perhaps figures.

    Attributes:
      title: the heading.
      text: plain text under it.
      header: column names of the table.
      rows: its rows.
      figures: file names of PNG figures, relative to the report.
    """

    title: str
    text: str = ""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()
    figures: Sequence[str] = ()


def whole_sections(groups: Groups, plan: Plan) -> list[Section]:
    """What was not pruned and why, and what of the small function runs wider than its plan."""
    sections = [Section("What was not pruned, and why", "", *groups.fixed_table())]
    ran, title = uncut(groups, plan), "What runs wider than the plan"
    if not ran:
        text = "Every equation of the small function runs at its small size."
        return [*sections, Section(title, text)]
    share = sum(equation.flops for equation in ran) / work_in(groups)
    text = (
        f"{len(ran)} equations, {share:.2%} of the full function's FLOPs: at a smaller size their result "
        "would differ from the masked function's."
    )
    rows = [
        (e.where, e.flops, "to feed another one" if e.again else "inexact at a smaller size") for e in ran
    ]
    return [*sections, Section(title, text, ("equation", "FLOPs", "because"), rows)]


_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid #ddd; text-align: right; }
th.text, td.text { text-align: left; }
th { border-bottom: 2px solid #999; }
img { max-width: 100%; margin-top: 0.8rem; }
.warning { background: #fff3cd; border-left: 4px solid #E69F00; padding: 0.6rem 1rem; }
.scroll { overflow-x: auto; }
"""


def html_report(
    path: str | os.PathLike[str], title: str, sections: Sequence[Section], *, warning: str = ""
) -> None:
    """Write one HTML file that holds everything, figures included.

    Args:
      path: the file; figures are read from its folder.
      title: of the page.
      sections: its parts.
      warning: set in a box at the top, e.g. that stand-in data were used.
    """
    path = Path(path)
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if warning:
        parts.append(f'<p class="warning">{html.escape(warning)}</p>')
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts += [f"<p>{html.escape(text)}</p>" for text in section.text.split("\n\n") if text]
        if section.rows:
            parts.append(_html_table(section.header, section.rows))
        for name in section.figures:
            data = base64.b64encode((path.parent / name).read_bytes()).decode()
            alt = html.escape(f"{section.title}: {name}")
            parts.append(f'<img alt="{alt}" src="data:image/png;base64,{data}">')
    body = "\n".join(parts)
    path.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}'
        f"</title><style>{_CSS}</style></head><body>{body}</body></html>\n",
        encoding="utf-8",
    )


def _html_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def cells(tag: str, values: Sequence[object]) -> str:
        return "".join(
            f"<{tag}{' class=text' if is_text else ''}>{html.escape(str(value))}</{tag}>"
            for is_text, value in zip(text, values, strict=True)
        )

    # Text reads from the left, figures compare from the right.
    text = [not all(is_number(row[column]) for row in rows) for column in range(len(header))]
    lines = [f"<tr>{cells('td', row)}</tr>" for row in rows]
    head = f"<tr>{cells('th', header)}</tr>"
    return f'<div class="scroll"><table>{head}{"".join(lines)}</table></div>'


def save_figures(folder: str | os.PathLike[str], figures: Mapping[str, Figure]) -> list[str]:
    """Write figures as PNG and close them.

    Returns:
      Their file names.
    """
    names = []
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        plt.close(figure)
        (Path(folder) / f"{name}.png").write_bytes(buffer.getvalue())
        names.append(f"{name}.png")
    return names
