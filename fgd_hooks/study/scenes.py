"""A small detection data set that is drawn, not downloaded: six kinds of shape on textured ground.

The shapes differ little (a disc and a ring, a plain and a striped square), overlap, are cut by the border, vary five
times in size and lie among shapes that belong to no class, so a larger model is clearly better than a small one.
Everything follows from the seed: the pictures are made with integers of a NumPy generator and with Pillow's integer
drawing, without fonts, so that every machine draws the same pixels.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw

from fgd_hooks.utils.files import write_json

CLASSES = ("disc", "ring", "square", "grating", "triangle", "star")
DISTRACTORS = ("hexagon", "ellipse", "cross", "bar", "striped_disc")
DRAWING = 1  # raise this when the same settings draw other pictures than before
_SPLITS = ("train", "val")
_SUPERSAMPLING = 4  # masks are drawn this much larger and averaged down, for smooth edges
_RADII = (0.05, 0.2)  # least and greatest radius of a shape, in widths of the image
_MIN_VISIBLE = 0.3  # a shape of which less is left uncovered gets no box

Point = tuple[float, float]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class SceneSettings:
    """What is drawn. Same settings, same pictures.

    Attributes:
        train: number of training images.
        val: number of validation images.
        size: width and height of every image, in pixels.
        objects: least and greatest number of shapes of the classes in one image, before some are covered.
        distractors: greatest number of shapes without a class in one image.
        seed: of the whole data set; image ``i`` of a split does not depend on how many images there are.
    """

    train: int = 320
    val: int = 100
    size: int = 160
    objects: tuple[int, int] = (3, 9)
    distractors: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.train < 1 or self.val < 1:
            raise ValueError(f"train and val must be at least 1 image each, got train={self.train}, val={self.val}")
        if self.size < 64 or self.size % 32:
            raise ValueError(f"size must be a multiple of 32 and at least 64 pixels, got {self.size}")
        if not 1 <= self.objects[0] <= self.objects[1]:
            raise ValueError(f"objects must be (least, greatest) with 1 <= least <= greatest, got {self.objects}")
        if self.distractors < 0:
            raise ValueError(f"distractors must not be negative, got {self.distractors}")


@dataclass(frozen=True)
class SceneBox:
    """One labelled shape: class index and the pixel box around what is visible of it (x2 and y2 exclusive)."""

    label: int
    x1: int
    y1: int
    x2: int
    y2: int
    visible: float
    """Part of the shape's pixels inside the image that no later shape covers, 0.3 to 1."""


@dataclass(frozen=True)
class _Shape:
    kind: str
    x: float
    y: float
    radius: float
    angle: float
    detail: float  # 0..1, what it means depends on the kind: width of a ring, width of stripes


def draw_scene(rng: np.random.Generator, settings: SceneSettings) -> tuple[Image.Image, list[SceneBox]]:
    """Draw one image.

    Returns:
        The RGB image (size x size) and its boxes in drawing order, at least one.
    """
    while True:  # a scene in which every shape is covered is drawn anew; hardly ever happens
        image = _background(rng, settings.size)
        shapes = _place(rng, settings)
        masks = []
        for shape in shapes:
            masks.append(_paint(image, shape, rng))
        boxes = _visible_boxes(shapes, masks)
        if boxes:
            return _light_and_noise(rng, image), boxes


def make_dataset(out: Path, settings: SceneSettings | None = None) -> Path:
    """Draw the data set into a folder, or leave it alone where it is already there with the same settings.

    Writes ``images/{train,val}/*.png``, ``labels/{train,val}/*.txt`` (YOLO: class, centre and size, 0..1),
    ``annotations/instances_{train,val}.json`` (COCO, category id = class + 1), ``data.yaml`` and, last of all,
    ``scenes.json`` with the settings: a folder without it is unfinished and drawn again.

    Args:
        out: folder to write to; made when missing. What an earlier call wrote there is replaced when the settings
            differ.
        settings: what to draw.

    Returns:
        Path of ``data.yaml``.
    """
    settings = settings or SceneSettings()
    out = Path(out)
    marker = out / "scenes.json"
    wanted = json.loads(json.dumps({**asdict(settings), "drawing": DRAWING}))
    if marker.is_file() and json.loads(marker.read_text()) == wanted:
        return out / "data.yaml"
    marker.unlink(missing_ok=True)
    for folder in ("images", "labels", "annotations"):
        shutil.rmtree(out / folder, ignore_errors=True)
    for split in _SPLITS:
        _write_split(out, split, settings)
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(CLASSES))
    # No `path`: the splits are then found beside this file, from whatever folder a program is started.
    (out / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames:\n{names}")
    write_json(marker, wanted)
    return out / "data.yaml"


def _write_split(out: Path, split: str, settings: SceneSettings) -> None:
    """Draw and label all images of one split."""
    images, labels = out / "images" / split, out / "labels" / split
    for folder in (images, labels, out / "annotations"):
        folder.mkdir(parents=True, exist_ok=True)
    coco: dict[str, list[dict[str, object]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
    }
    size = settings.size
    for index in range(settings.train if split == "train" else settings.val):
        rng = np.random.default_rng([settings.seed, _SPLITS.index(split), index])
        image, boxes = draw_scene(rng, settings)
        image.save(images / f"{index:04d}.png", compress_level=1)
        coco["images"].append({"id": index + 1, "file_name": f"{index:04d}.png", "width": size, "height": size})
        lines = []
        for box in boxes:
            width, height = box.x2 - box.x1, box.y2 - box.y1
            centre = ((box.x1 + box.x2) / 2, (box.y1 + box.y2) / 2)
            lines.append(" ".join([str(box.label), *(f"{v / size:.6f}" for v in (*centre, width, height))]))
            coco["annotations"].append(
                {
                    "id": len(coco["annotations"]) + 1,
                    "image_id": index + 1,
                    "category_id": box.label + 1,
                    "bbox": [box.x1, box.y1, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
        (labels / f"{index:04d}.txt").write_text("\n".join(lines) + "\n")
    (out / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco))


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A float in [low, high) from an integer, which every NumPy version and machine draws alike."""
    return low + (high - low) * int(rng.integers(0, 1 << 24)) / (1 << 24)


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(v) for v in rng.integers(20, 236, 3))
    return red, green, blue


def _background(rng: np.random.Generator, size: int) -> Image.Image:
    """Two layers of smooth coloured blotches, coarse and fine, in two random colours."""
    ground = Image.new("RGB", (size, size), _colour(rng))
    for cells, strength in ((4, 150), (size // 8, 70), (size // 3, 40)):
        blotches = Image.fromarray(rng.integers(0, strength, (cells, cells), dtype=np.uint8))
        mask = blotches.resize((size, size), Image.Resampling.BICUBIC)
        ground.paste(_colour(rng), (0, 0), mask)
    return ground


def _place(rng: np.random.Generator, settings: SceneSettings) -> list[_Shape]:
    """Choose the shapes of one scene in random drawing order; every third one lies close to another."""
    count = int(rng.integers(settings.objects[0], settings.objects[1] + 1))
    kinds = [CLASSES[int(i)] for i in rng.integers(0, len(CLASSES), count)]
    spare = int(rng.integers(0, settings.distractors + 1))
    kinds += [DISTRACTORS[int(i)] for i in rng.integers(0, len(DISTRACTORS), spare)]
    kinds = [kinds[int(i)] for i in np.argsort(rng.integers(0, 1 << 30, len(kinds)), kind="stable")]
    shapes: list[_Shape] = []
    size = settings.size
    for kind in kinds:
        # Small ones are more frequent: the exponent is uniform.
        radius = size * _RADII[0] * (_RADII[1] / _RADII[0]) ** _uniform(rng, 0, 1)
        x, y = _uniform(rng, 0.02, 0.98) * size, _uniform(rng, 0.02, 0.98) * size
        if shapes and int(rng.integers(0, 3)) == 0:
            other = shapes[int(rng.integers(0, len(shapes)))]
            direction = _uniform(rng, 0, 2 * math.pi)
            distance = (radius + other.radius) * _uniform(rng, 0.6, 1.1)
            x = min(max(other.x + distance * math.cos(direction), 0.02 * size), 0.98 * size)
            y = min(max(other.y + distance * math.sin(direction), 0.02 * size), 0.98 * size)
        shapes.append(_Shape(kind, x, y, radius, _uniform(rng, 0, 2 * math.pi), _uniform(rng, 0, 1)))
    return shapes


def _paint(image: Image.Image, shape: _Shape, rng: np.random.Generator) -> Mask:
    """Draw one shape onto the image and return its pixels, (H, W) bool."""
    mask = _outline_mask(shape, image.width)
    fill = _colour(rng)
    image.paste(fill, (0, 0), mask)
    if shape.kind in ("grating", "striped_disc"):
        # Light and dark of the stripes differ by 50 to 90 levels per channel, whatever the fill.
        shift = int(rng.integers(50, 91))
        other = tuple(v + shift if v < 128 else v - shift for v in fill)
        image.paste(other, (0, 0), ImageChops.multiply(mask, _stripes_mask(shape, image.width)))
    return np.asarray(mask) >= 128


def _outline_mask(shape: _Shape, size: int) -> Image.Image:
    """Coverage of the pixels by a shape, 0..255, (size, size)."""
    parts = [(_outline(shape.kind, shape.detail), 255)]
    if shape.kind == "ring":
        parts.append((_regular(48, 0.35 + 0.3 * shape.detail), 0))
    return _polygons(shape, size, parts)


def _stripes_mask(shape: _Shape, size: int) -> Image.Image:
    """Stripes across a shape's square, 0..255, (size, size): 3 to 5 dark bars."""
    bars = 3 + int(shape.detail * 2.999)
    step = 2 / (2 * bars + 1)
    edges = [-1 + step * (2 * bar + 1) for bar in range(bars)]
    return _polygons(shape, size, [([(x, -1.5), (x + step, -1.5), (x + step, 1.5), (x, 1.5)], 255) for x in edges])


def _polygons(shape: _Shape, size: int, parts: Sequence[tuple[list[Point], int]]) -> Image.Image:
    """Polygons around a shape's centre, drawn one after the other in their grey, (size, size)."""
    large = Image.new("L", (size * _SUPERSAMPLING, size * _SUPERSAMPLING), 0)
    pencil = ImageDraw.Draw(large)
    for points, grey in parts:
        pencil.polygon(_to_canvas(shape, points), fill=grey)
    return large.reduce(_SUPERSAMPLING)


def _outline(kind: str, detail: float) -> list[Point]:
    """Corners of a shape of radius 1 around the origin."""
    if kind in REGULAR:
        corners, turn = REGULAR[kind]
        return _regular(corners, turn=turn)
    if kind == "star":
        outer, inner = _regular(5), _regular(5, 0.45, turn=0.5)
        return [point for pair in zip(outer, inner, strict=True) for point in pair]
    if kind == "ellipse":
        return [(x, y * (0.4 + 0.2 * detail)) for x, y in _regular(48)]
    if kind == "bar":
        return [(x * 1.2, y * (0.15 + 0.15 * detail)) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    arm = 0.25 + 0.15 * detail  # a cross
    quarter = [(arm, arm), (arm, 1.0), (-arm, 1.0)]
    points = []
    for _ in range(4):
        points += quarter
        quarter = [(-y, x) for x, y in quarter]
    return points


REGULAR = {
    **dict.fromkeys(("disc", "ring", "striped_disc"), (48, 0.0)),
    **dict.fromkeys(("square", "grating"), (4, 0.5)),
    "triangle": (3, 0.0),
    "hexagon": (6, 0.0),
}
"""Kinds that are regular polygons: corners, and how far they are turned."""


def _regular(corners: int, radius: float = 1.0, turn: float = 0.0) -> list[Point]:
    """A regular polygon; ``turn`` rotates it by that part of the angle between two corners."""
    angles = [2 * math.pi * (i + turn) / corners for i in range(corners)]
    return [(radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _to_canvas(shape: _Shape, points: Sequence[Point]) -> list[tuple[int, int]]:
    """Corners of radius 1 to whole pixels of the enlarged canvas: rounded, so that no float decides a pixel."""
    cos, sin = math.cos(shape.angle), math.sin(shape.angle)
    return [
        (
            round((shape.x + shape.radius * (cos * x - sin * y)) * _SUPERSAMPLING),
            round((shape.y + shape.radius * (sin * x + cos * y)) * _SUPERSAMPLING),
        )
        for x, y in points
    ]


def _visible_boxes(shapes: Sequence[_Shape], masks: Sequence[Mask]) -> list[SceneBox]:
    """Boxes around what later shapes leave visible; shapes that are nearly covered are left out."""
    boxes = []
    covered = np.zeros_like(masks[0])
    for shape, mask in zip(reversed(shapes), reversed(masks), strict=True):
        seen = mask & ~covered
        covered |= mask
        total = int(mask.sum())
        if shape.kind not in CLASSES or total == 0 or int(seen.sum()) < max(_MIN_VISIBLE * total, 12):
            continue
        rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
        x1, x2 = int(columns[0]), int(columns[-1]) + 1
        y1, y2 = int(rows[0]), int(rows[-1]) + 1
        boxes.append(SceneBox(CLASSES.index(shape.kind), x1, y1, x2, y2, int(seen.sum()) / total))
    return boxes[::-1]


def _light_and_noise(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Darken or brighten the whole image and add pixel noise, both in whole numbers."""
    gain = int(rng.integers(70, 116))  # per cent
    amplitude = int(rng.integers(3, 14))
    pixels = np.asarray(image).astype(np.int32) * gain // 100
    for _ in range(2):  # the sum of two uniform draws: a triangular distribution
        pixels += rng.integers(-amplitude, amplitude + 1, pixels.shape, dtype=np.int32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
