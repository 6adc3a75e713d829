"""Draw what the distillation looks at: one picture per image and level, readable with every kind of colour vision.

:func:`~fgd_hooks.diagnostics.attention.attention_sheets` computes what is drawn here. Figures have an Agg canvas;
pyplot and its global state are not used.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fgd_hooks.diagnostics.attention import LevelSheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Detection = tuple[str, float, Sequence[float]]

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
        dpi: pixels per inch of the figure, which is 15.4 inches wide.

    Returns:
        A figure with an Agg canvas; ``figure.savefig(...)`` writes it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    height, width = sheet.image.shape[1:]
    map_height = min(max(3.2 * height / width, 1.7), 4.2)
    figure = Figure(figsize=(15.4, 2 * map_height + 2.8), dpi=dpi)  # inches
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    FigureCanvasAgg(figure)
    rows, columns = sheet.foreground.shape
    title = f"{sheet.name}, level {sheet.level}: {rows} x {columns} cells, each {sheet.stride} x {sheet.stride} pixels"
    figure.suptitle(title, x=0.01, ha="left", fontsize=15, fontweight="bold")
    grid = figure.add_gridspec(2, 4, width_ratios=[4, 4, 4, 3])
    panels = [figure.add_subplot(grid[number // 3, number % 3]) for number in range(6)]
    image, foreground, background, teacher, student, difference = panels

    count, cells = len(sheet.boxes), int((sheet.background > 0).sum())
    _draw_image(image, sheet)
    _caption(image, "Image", f"what both models get, with the boxes of {count} labelled object{'s' * (count != 1)}")
    weight, unit = "weight of a cell", "attention (1: average cell)"
    _draw_map(foreground, sheet, sheet.foreground, weight)
    sentence = "1 / area of the smallest box over the cell, boxes rounded outwards to whole cells: small objects count "
    _caption(foreground, "Foreground weights", f"{sentence}as much as large ones")
    _draw_map(background, sheet, sheet.background, weight)
    sentence = f"the {cells} cells outside all boxes weigh the same, together 1"
    _caption(background, "Background weights", sentence if cells else "none: boxes touch every cell of this level")
    # up to 2 at least, so that an average cell is never drawn as a bright one
    limits = [max(2.0, float(each.max())) for each in (sheet.teacher_spatial, sheet.student_spatial)]
    if sheet.adapted:
        limits = [max(limits)] * 2
    _draw_map(teacher, sheet, sheet.teacher_spatial, unit, limits[0])
    _caption(teacher, "Teacher's attention", "bright: where the teacher's feature map is strong")
    _draw_map(student, sheet, sheet.student_spatial, unit, limits[1])
    if sheet.adapted:
        _caption(student, "Student's attention", "the student, as the loss sees it; same colours as for the teacher")
        _draw_map(difference, sheet, sheet.difference, "student minus teacher", diverging=True)
        sentence = "orange: the student looks harder than the teacher; purple: less; white: alike"
        _caption(difference, f"Difference: {sheet.distance:.2f} on average", sentence)
    else:
        sentence = "no trained adapter was found: compare the places, not the strength (colours of its own)"
        _caption(student, "Student's own attention", sentence)
        difference.set(xticks=[], yticks=[], box_aspect=height / width)
        sentence = "the two strengths have no common unit; the training leaves its adapters in last.fgd.safetensors"
        _caption(difference, "No difference", sentence)
    _draw_channels(figure.add_subplot(grid[:, 3]), sheet, top)
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


def save_detections(image: Any, found: Mapping[str, Sequence[Detection]], file: Path) -> Path:
    """Draw what several models find in one image side by side.

    Args:
        image: (h, w, 3) or (h, w) bytes.
        found: title of a panel to its detections: class, confidence, and pixel x1 y1 x2 y2.
        file: the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    height, width = image.shape[:2]
    figure = Figure(figsize=(4.6 * len(found), 4.6 * min(height / width, 1.6) + 0.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, detections) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"{title}: {len(detections)} found", loc="left", fontsize=11, fontweight="bold")
        for name, confidence, (x1, y1, x2, y2) in detections:
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=_BOX, linewidth=1.5))
            label = f"{name} {confidence:.2f}".replace("$", r"\$")  # no formula
            axes.text(x1, y1, label, fontsize=7, color="white", va="bottom", backgroundcolor="#00000080")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    return file


def sheet_pixels(sheet: LevelSheet, *, top: int = 10, dpi: int = 60) -> Any:
    """The drawn sheet as an array (height, width, 3) of bytes, as TensorBoard's ``add_image`` takes it."""
    import numpy as np

    figure = draw_sheet(sheet, top=top, dpi=dpi)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[:, :, :3]  # type: ignore[attr-defined]


def _caption(axes: Axes, title: str, sentence: str, *, drop: float = 5, columns: int = 50) -> None:
    """A bold title above a panel, and one plain sentence ``drop`` points below it."""
    axes.set_title(title, loc="left", fontsize=12.5, fontweight="bold")
    place: dict[str, Any] = {"xycoords": "axes fraction", "xytext": (0, -drop), "textcoords": "offset points"}
    axes.annotate(textwrap.fill(sentence, columns), (0, 0), **place, va="top", fontsize=9.5)


def _draw_image(axes: Axes, sheet: LevelSheet) -> None:
    image = sheet.image
    if len(image) not in (1, 3):
        image = image.mean(0, keepdim=True)
    low, high = float(image.min()), float(image.max())
    if low < 0 or high > 1:  # normalised by mean and deviation, or 0 to 255
        image = (image - low) / max(high - low, 1e-12)
    axes.imshow(image.permute(1, 2, 0).expand(-1, -1, 3).numpy(), interpolation="nearest")
    _draw_boxes(axes, sheet, _BOX, 2.0)


def _draw_map(
    axes: Axes, sheet: LevelSheet, cells: Tensor, label: str, limit: float | None = None, *, diverging: bool = False
) -> None:
    """Cells (H, W) over the area of the image, with the true boxes on top and a colour bar up to ``limit``."""
    height, width = sheet.image.shape[1:]
    limit = (float(cells.abs().max()) if limit is None else limit) or 1.0
    shown = axes.imshow(
        cells.numpy(),
        extent=(0, width, height, 0),
        interpolation="nearest",
        cmap=DIFFERENCE_COLOURS if diverging else ATTENTION_COLOURS,
        vmin=-limit if diverging else 0.0,
        vmax=limit,
    )
    _draw_boxes(axes, sheet, "black" if diverging else "white", 0.8)
    bar = axes.figure.colorbar(shown, cax=axes.inset_axes((1.03, 0, 0.04, 1)))
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _draw_boxes(axes: Axes, sheet: LevelSheet, colour: str, width: float) -> None:
    from matplotlib.patches import Rectangle

    axes.set_xticks([])
    axes.set_yticks([])
    for x1, y1, x2, y2 in sheet.boxes.tolist():
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=width))


def _draw_channels(axes: Axes, sheet: LevelSheet, top: int) -> None:
    """The teacher's strongest channels as bars, the student's values beside them."""
    values, chosen = sheet.teacher_channels.topk(min(top, len(sheet.teacher_channels)))
    places = torch.arange(len(chosen), dtype=torch.float32)
    sentence, thick, shift = "the teacher's strongest; the student's would need a trained adapter", 0.7, 0.0
    if sheet.student_channels is not None:
        sentence, thick, shift = "the teacher's strongest, with the student's; dotted: the average", 0.4, 0.2
    axes.barh((places - shift).numpy(), values.numpy(), thick, color=_TEACHER, label="teacher")
    if sheet.student_channels is not None:
        student = sheet.student_channels[chosen].numpy()
        axes.barh((places + shift).numpy(), student, thick, color=_STUDENT, label="student")
    axes.axvline(1, color="#333333", linestyle=":", linewidth=1.5)
    axes.set_yticks(places.tolist(), [str(int(each)) for each in chosen])
    axes.set_ylabel("number of the channel", fontsize=9)
    axes.set_ylim(len(chosen) - 0.4, -1.6)  # room for the legend above the bars
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", fontsize=10, frameon=False, ncols=2)
    _caption(axes, f"Top {len(chosen)} of {len(sheet.teacher_channels)} channels", sentence, drop=20, columns=42)
