"""Draw what the distillation looks at: one picture per image and level, readable with every kind of colour vision.

:func:`~fgd_hooks.diagnostics.attention.attention_sheets` computes what is drawn here. Figures have an Agg canvas;
pyplot and its global state are not used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fgd_hooks.diagnostics.attention import LevelSheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


ATTENTION_COLOURS = "cividis"  # even steps of brightness, the same for every kind of colour vision


DIFFERENCE_COLOURS = "PuOr_r"  # purple to orange: told apart with every kind of colour vision


_TEACHER, _STUDENT, _BOX = "#0072B2", "#E69F00", "#E69F00"  # Okabe-Ito blue and orange


def draw_sheet(sheet: LevelSheet, *, top: int = 10, dpi: int = 100) -> Figure:
    """Draw one sheet: image, masks, both spatial attentions, their difference, and the strongest channels.

    Teacher and student share one colour scale. Where the student has no trained adapter, strengths do not compare (the
    scale of the two feature maps differs): then each has a scale of its own, and no difference is drawn.

    Args:
        sheet: from :func:`attention_sheets`.
        top: this many of the teacher's strongest channels.
        dpi: pixels per inch of the figure, which is 16.4 inches wide.

    Returns:
        A figure with an Agg canvas; ``figure.savefig(...)`` writes it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layout = _Layout(sheet)
    figure = Figure(figsize=layout.size, dpi=dpi)
    FigureCanvasAgg(figure)
    rows, columns = sheet.foreground.shape
    figure.text(
        layout.left / layout.size[0],
        1 - 0.2 / layout.size[1],
        f"{sheet.name}, level {sheet.level}: {rows} x {columns} cells, each {sheet.stride} x {sheet.stride} pixels",
        va="top",
        fontsize=15,
        fontweight="bold",
    )
    _draw_image(layout, figure, sheet)
    weight = "weight of a cell"
    _draw_map(layout, figure, (0, 1), sheet, sheet.foreground, weight)
    layout.caption(
        "Foreground weights",
        "1 / area of the smallest box over the cell, boxes rounded outwards to whole cells: small objects count as "
        "much as large ones",
    )
    _draw_map(layout, figure, (0, 2), sheet, sheet.background, weight)
    cells = int((sheet.background > 0).sum())
    layout.caption(
        "Background weights",
        f"the {cells} cells outside all boxes weigh the same, together 1"
        if cells
        else "none: boxes touch every cell of this level",
    )
    unit = "attention (1: average cell)"
    # up to 2 at least, so that an average cell is never drawn as a bright one
    limits = [max(2.0, float(each.max())) for each in (sheet.teacher_spatial, sheet.student_spatial)]
    shared = [max(limits)] * 2 if sheet.adapted else limits
    _draw_map(layout, figure, (1, 0), sheet, sheet.teacher_spatial, unit, shared[0])
    layout.caption("Teacher's attention", "bright: where the teacher's feature map is strong")
    _draw_map(layout, figure, (1, 1), sheet, sheet.student_spatial, unit, shared[1])
    if sheet.adapted:
        layout.caption("Student's attention", "the student, as the loss sees it; same colours as for the teacher")
        _draw_map(layout, figure, (1, 2), sheet, sheet.difference, "student minus teacher", diverging=True)
        layout.caption(
            f"Difference: {sheet.distance:.2f} on average",
            "orange: the student looks harder than the teacher; purple: less; white: alike",
        )
    else:
        layout.caption(
            "Student's own attention",
            "no trained adapter was found: compare the places, not the strength (colours of its own)",
        )
        empty = layout.panel(figure, 1, 2)
        empty.text(
            0.5, 0.5, "Without a trained adapter\nthe strengths of the two maps\nhave no common unit.", ha="center"
        )
        layout.caption("No difference", "the training leaves its adapters in last.fgd.pt, beside the student's weights")
    _draw_channels(layout, figure, sheet, top)
    return figure


def save_sheets(sheets: Sequence[LevelSheet], folder: str | Path, *, top: int = 10, dpi: int = 100) -> list[Path]:
    """Draw each sheet into ``folder`` as ``<image>_<level>.png``; images of one name are numbered apart.

    Returns:
        The files, in the order of the sheets.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for sheet in sheets:
        stem = f"{re.sub(r'[^A-Za-z0-9._-]+', '_', sheet.name)}_{sheet.level}"
        file, number = folder / f"{stem}.png", 2
        while file in files:
            file, number = folder / f"{stem}_{number}.png", number + 1
        draw_sheet(sheet, top=top, dpi=dpi).savefig(file)
        files.append(file)
    return files


def sheet_pixels(sheet: LevelSheet, *, top: int = 10, dpi: int = 60) -> Any:
    """The drawn sheet as an array (height, width, 3) of bytes, as TensorBoard's ``add_image`` takes it."""
    import numpy as np

    figure = draw_sheet(sheet, top=top, dpi=dpi)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[:, :, :3]  # type: ignore[attr-defined]


class _Layout:
    """Places the panels, in inches: three columns of maps with colour bars in two rows, one tall panel of bars."""

    left, gap, map_width, bar_width, channel_width = 0.35, 0.95, 3.2, 0.13, 2.7
    above, below, title = 0.45, 0.65, 0.45

    def __init__(self, sheet: LevelSheet) -> None:
        height, width = sheet.image.shape[1:]
        self.map_height = min(max(self.map_width * height / width, 1.7), 4.2)
        self.row = self.map_height + self.below + self.title
        self.size = (
            self.left + 3 * (self.map_width + self.gap) + 0.55 + self.channel_width + 0.3,
            self.above + 2 * self.row,
        )
        self._axes: Axes | None = None

    def _place(self, figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
        return figure.add_axes((x / self.size[0], y / self.size[1], width / self.size[0], height / self.size[1]))

    def panel(self, figure: Figure, row: int, column: int) -> Axes:
        """The axes of a map; the next caption is its."""
        x, y = self.left + column * (self.map_width + self.gap), (1 - row) * self.row + self.below
        self._axes = self._place(figure, x, y, self.map_width, self.map_height)
        self._axes.set_xticks([])
        self._axes.set_yticks([])
        return self._axes

    def bar(self, figure: Figure, row: int, column: int) -> Axes:
        """The axes of a map's colour bar."""
        x = self.left + column * (self.map_width + self.gap) + self.map_width + 0.08
        return self._place(figure, x, (1 - row) * self.row + self.below, self.bar_width, self.map_height)

    def channels(self, figure: Figure) -> Axes:
        """The axes of the channel bars; the next caption is its."""
        x = self.size[0] - 0.3 - self.channel_width
        self._axes = self._place(figure, x, self.below, self.channel_width, self.row + self.map_height)
        return self._axes

    def caption(self, title: str, sentence: str, *, drop: float = 5, columns: int = 58) -> None:
        """A bold title above the last panel, and one plain sentence ``drop`` points below it."""
        import textwrap

        if self._axes is None:
            raise RuntimeError("A caption needs a panel first.")
        self._axes.set_title(title, loc="left", fontsize=12.5, fontweight="bold")
        self._axes.annotate(
            textwrap.fill(sentence, columns),
            (0, 0),
            xycoords="axes fraction",
            xytext=(0, -drop),
            textcoords="offset points",
            va="top",
            fontsize=9.5,
        )


def _draw_image(layout: _Layout, figure: Figure, sheet: LevelSheet) -> None:
    image = sheet.image
    if len(image) not in (1, 3):
        image = image.mean(0, keepdim=True)
    low, high = float(image.min()), float(image.max())
    if low < 0 or high > 1:  # normalised by mean and deviation, or 0 to 255
        image = (image - low) / max(high - low, 1e-12)
    axes = layout.panel(figure, 0, 0)
    axes.imshow(image.permute(1, 2, 0).expand(-1, -1, 3).numpy(), interpolation="nearest")
    _draw_boxes(axes, sheet, _BOX, 2.0)
    count = len(sheet.boxes)
    layout.caption("Image", f"what both models get, with the boxes of {count} labelled object{'s' * (count != 1)}")


def _draw_map(
    layout: _Layout,
    figure: Figure,
    place: tuple[int, int],
    sheet: LevelSheet,
    cells: Tensor,
    label: str,
    limit: float | None = None,
    *,
    diverging: bool = False,
) -> None:
    """Cells (H, W) over the area of the image, with the true boxes on top and a colour bar up to ``limit``."""
    height, width = sheet.image.shape[1:]
    limit = (float(cells.abs().max()) if limit is None else limit) or 1.0
    axes = layout.panel(figure, *place)
    shown = axes.imshow(
        cells.numpy(),
        extent=(0, width, height, 0),
        interpolation="nearest",
        cmap=DIFFERENCE_COLOURS if diverging else ATTENTION_COLOURS,
        vmin=-limit if diverging else 0.0,
        vmax=limit,
    )
    _draw_boxes(axes, sheet, "black" if diverging else "white", 0.8)
    bar = figure.colorbar(shown, cax=layout.bar(figure, *place))
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _draw_boxes(axes: Axes, sheet: LevelSheet, colour: str, width: float) -> None:
    from matplotlib.patches import Rectangle

    for x1, y1, x2, y2 in sheet.boxes.tolist():
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=width))


def _draw_channels(layout: _Layout, figure: Figure, sheet: LevelSheet, top: int) -> None:
    """The teacher's strongest channels as bars, the student's values beside them."""
    axes = layout.channels(figure)
    values, chosen = sheet.teacher_channels.topk(min(top, len(sheet.teacher_channels)))
    places = torch.arange(len(chosen), dtype=torch.float32)
    paired = sheet.student_channels is not None
    thick = 0.4 if paired else 0.7
    axes.barh((places - thick / 2 * paired).numpy(), values.numpy(), thick, color=_TEACHER, label="teacher")
    if sheet.student_channels is not None:
        student = sheet.student_channels[chosen].numpy()
        axes.barh((places + thick / 2).numpy(), student, thick, color=_STUDENT, label="student")
    axes.axvline(1, color="#333333", linestyle=":", linewidth=1.5)
    axes.set_yticks(places.tolist(), [str(int(each)) for each in chosen])
    axes.set_ylabel("number of the channel", fontsize=9)
    axes.set_ylim(len(chosen) - 0.4, -1.6)  # room for the legend above the bars
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", fontsize=10, frameon=False, ncols=2)
    sentence = "the teacher's strongest, with the student's; dotted: the average"
    if not paired:
        sentence = "the teacher's strongest; the student's would need a trained adapter"
    layout.caption(f"Top {len(chosen)} of {len(sheet.teacher_channels)} channels", sentence, drop=20, columns=42)
