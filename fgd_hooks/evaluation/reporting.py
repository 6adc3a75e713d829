"""What all reports share: figures as text, tables for terminal and Markdown, curves with a band."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table as RichTable
    from rich.text import Text

# The Okabe-Ito palette, told apart with every kind of colour vision; markers tell the lines apart once more.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_LINES = ("-", "--", ":")  # beyond seven curves the colours come again with another line


@dataclass(frozen=True)
class Curve:
    """One arm of a study: the curves of its runs, one run per seed.

    Attributes:
        label: its name in the legend.
        epochs: the epochs of the values, for all runs the same.
        runs: one sequence of values per run, as long as ``epochs``.
    """

    label: str
    epochs: Sequence[int]
    runs: Sequence[Sequence[float]]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean, with the standard deviation of the sample where there are several values: ``41.0 ± 1.4``; ``-`` of none."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def percent(value: float | None) -> str:
    """A part of 1 as per cent with one decimal; a dash for None."""
    return "-" if value is None else f"{100 * value:.1f}"


def plain(text: object) -> Text:
    """Text for a terminal as it is: rich would take ``[red]`` in a class or file name for markup."""
    from rich.text import Text

    return Text(str(text))


@dataclass(frozen=True)
class Table:
    """Cells as text, for a terminal and for Markdown alike; the first column is aligned left, the others right.

    Attributes:
        headings: of the columns.
        rows: of cells, as many as there are headings.
        title: above the table.
        caption: below it, in a terminal.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    caption: str = ""

    def markdown(self) -> list[str]:
        """The lines of a Markdown table, without the title."""
        lines = [_markdown_row(self.headings), "|---" + "|--:" * (len(self.headings) - 1) + "|"]
        return [*lines, *(_markdown_row(row) for row in self.rows)]

    def rich(self, ruled: int = 0, **options: Any) -> RichTable:
        """For a terminal."""
        from rich.table import Table as RichTable

        title, caption = (plain(text) if text else None for text in (self.title, self.caption))
        table = RichTable(title=title, caption=caption, **options)
        for number, heading in enumerate(self.headings):
            left = not number or heading in ("tap", "adapter")
            table.add_column(plain(heading), justify="left" if left else "right", overflow="fold")
        for number, row in enumerate(self.rows, 1):
            table.add_row(*map(plain, row), end_section=number == ruled)
        return table


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def draw_curves(
    curves: Sequence[Curve], file: Path, *, title: str, ylabel: str, reference: tuple[str, float] | None = None
) -> None:
    """Draw curves over the epochs as a PNG: the mean over an arm's runs, and one standard deviation as a band."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9.0, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ends: list[tuple[float, int, str, str]] = []
    for number, curve in enumerate(curves):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        mean = [statistics.fmean(values) for values in zip(*curve.runs, strict=True)]
        if len(curve.runs) > 1:
            half = [statistics.stdev(values) for values in zip(*curve.runs, strict=True)]
            low, high = ([m + sign * h for m, h in zip(mean, half, strict=True)] for sign in (-1, 1))
            if len(mean) > 1:
                axes.fill_between(curve.epochs, low, high, color=colour, alpha=0.2, linewidth=0)
            else:
                axes.errorbar(curve.epochs, mean, half, color=colour, capsize=3)
        axes.plot(
            curve.epochs,
            mean,
            _LINES[number // len(COLOURS) % len(_LINES)],
            color=colour,
            marker=marker,
            markevery=max(1, len(mean) // 12),
            linewidth=2.2,
            markersize=5,
        )
        if mean:
            seeds = f", {len(curve.runs)} seeds" if len(curve.runs) > 1 else ""
            ends.append((mean[-1], curve.epochs[-1], f"{curve.label} ({mean[-1]:.1f}{seeds})", colour))
    if reference:
        name, value = reference
        axes.axhline(value, color="#555555", linestyle="--", linewidth=1.4)
        ends.append((value, max((end[1] for end in ends), default=0), f"{name} ({value:.1f})", "#555555"))
    axes.set_xlabel("epoch")
    axes.set_ylabel(ylabel)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # there are whole epochs only
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=11)
    _label_ends(axes, ends)
    figure.savefig(file)


def _label_ends(axes: Any, ends: Sequence[tuple[float, int, str, str]]) -> None:
    """Write each curve's name beside its end, right of the axes, moved apart where the ends lie close together."""
    low, high = axes.get_ylim()
    step = (high - low) * 0.052  # the height of a line of text
    place = low
    places = []
    for value, *_ in sorted(ends):
        place = max(value, place + step)
        places.append(place)
    for index in range(len(places) - 1, -1, -1):  # what rose above the picture comes down again
        limit = high if index == len(places) - 1 else places[index + 1] - step
        places[index] = min(places[index], limit)
    for (value, epoch, text, colour), height in zip(sorted(ends), places, strict=True):
        axes.annotate(
            text,
            (epoch, value),
            xytext=(1.02, height),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            color=colour,
            fontsize=9,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.5},
        )
