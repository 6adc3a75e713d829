"""COCO metrics of detections, computed by pycocotools, as plain numbers and as tables."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fgd_hooks.errors import DataError, needs_extra
from fgd_hooks.evaluation.dataset import EvalData, Floats
from fgd_hooks.evaluation.reporting import Table, percent

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class ClassMetrics:
    """Metrics of one class, each from 0 to 1; None where the data have no box of the class.

    Attributes:
        name: of the class.
        images: images that show it.
        boxes: true boxes, without crowd regions.
        map50_95: average precision, mean over the IoU thresholds 0.50, 0.55, ... 0.95.
        map50: average precision at IoU 0.50.
        map75: average precision at IoU 0.75.
    """

    name: str
    images: int
    boxes: int
    map50_95: float | None
    map50: float | None
    map75: float | None


@dataclass(frozen=True)
class CocoMetrics:
    """COCO metrics over all classes, each from 0 to 1; None where the data have no box to measure it on.

    Attributes:
        map50_95: average precision, mean over the IoU thresholds 0.50, 0.55, ... 0.95 and over the classes.
        map50: the same at IoU 0.50 alone.
        map75: the same at IoU 0.75 alone.
        map_small: ``map50_95`` over true boxes of less than 32^2 pixels.
        map_medium: over those of 32^2 to 96^2 pixels.
        map_large: over those of more than 96^2 pixels.
        ar_1: average recall with one detection per image and class.
        ar_10: with ten.
        ar: with ``max_dets`` (100).
        ar_small: ``ar`` of small boxes.
        ar_medium: of medium ones.
        ar_large: of large ones.
        images: number of images.
        boxes: number of true boxes, without crowd regions.
        detections: number of detections judged.
        per_class: in the order of the data's classes.
    """

    map50_95: float | None
    map50: float | None
    map75: float | None
    map_small: float | None
    map_medium: float | None
    map_large: float | None
    ar_1: float | None
    ar_10: float | None
    ar: float | None
    ar_small: float | None
    ar_medium: float | None
    ar_large: float | None
    images: int
    boxes: int
    detections: int
    per_class: tuple[ClassMetrics, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, ready for JSON."""
        return {**asdict(self), "per_class": [asdict(entry) for entry in self.per_class]}  # a list, as in JSON

    def table(self, title: str | None = None) -> RichTable:
        """One row for all classes and one for each, in per cent."""
        entries: list[tuple[str, CocoMetrics | ClassMetrics]] = [("all", self)]
        entries += [(entry.name, entry) for entry in self.per_class]
        rows = [
            (name, str(each.images), str(each.boxes), *map(percent, (each.map50_95, each.map50, each.map75)))
            for name, each in entries
        ]
        return Table(("class", "images", "boxes", "mAP50-95", "mAP50", "mAP75"), rows, title or "").rich(ruled=1)

    def size_table(self) -> RichTable:
        """Precision and recall by size of the true box, in per cent."""
        rows = [
            (size, percent(precision), percent(recall))
            for size, precision, recall in (
                ("all", self.map50_95, self.ar),
                ("small (< 32² px)", self.map_small, self.ar_small),
                ("medium", self.map_medium, self.ar_medium),
                ("large (> 96² px)", self.map_large, self.ar_large),
            )
        ]
        return Table(("size", "AP50-95", "AR"), rows, "by size of the true box").rich()


def check_max_dets(max_dets: int) -> None:
    """Refuse a number of detections that pycocotools cannot judge by."""
    if max_dets < 10:
        raise DataError(f"max_dets is {max_dets}; expected at least 10 (recall is also measured with 1 and 10)")


def coco_metrics(truth: EvalData, detections: Sequence[Floats], max_dets: int = 100) -> CocoMetrics:
    """Judge detections with pycocotools.

    Args:
        truth: images and true boxes.
        detections: one (n, 6) array per image of ``truth.images``, in its order: left, top, width, height in pixels of
            the original image, confidence, class index as in ``truth.names``.
        max_dets: detections per image and class that count, the most confident ones.
    """
    if len(detections) != len(truth.images):
        raise ValueError(f"{len(detections)} arrays of detections for {len(truth.images)} images; give one per image")
    check_max_dets(max_dets)
    with needs_extra("eval"):
        from pycocotools.cocoeval import COCOeval

    true = (
        (number, int(label), box, {"area": float(area), "iscrowd": int(crowd)})
        for number, image in enumerate(truth.images)
        for label, box, area, crowd in zip(image.labels, image.boxes, image.areas, image.crowd, strict=True)
    )
    found = (
        (number, int(row[5]), row[:4], {"area": float(row[2] * row[3]), "score": float(row[4])})
        for number, rows in enumerate(detections)
        for row in rows
    )
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        judge = COCOeval(_coco(truth, true), _coco(truth, found), "bbox")
        judge.params.maxDets = [1, 10, max_dets]
        judge.evaluate()
        judge.accumulate()
    precision: Floats = judge.eval["precision"]  # IoU threshold, recall, class, size (all, s, m, l), max detections
    recall: Floats = judge.eval["recall"]  # IoU threshold, class, size, max detections
    sizes = ("small", "medium", "large")
    figures = _precisions(precision[..., 0, -1])
    figures |= {f"map_{size}": _mean(precision[..., number, -1]) for number, size in enumerate(sizes, 1)}
    figures |= {name: _mean(recall[..., 0, number]) for number, name in enumerate(("ar_1", "ar_10", "ar"))}
    figures |= {f"ar_{size}": _mean(recall[..., number, -1]) for number, size in enumerate(sizes, 1)}
    boxes = [np.bincount(image.labels[~image.crowd], minlength=len(truth.names)) for image in truth.images]
    return CocoMetrics(
        **figures,
        images=len(truth.images),
        boxes=int(np.sum(boxes)),
        detections=sum(map(len, detections)),
        per_class=tuple(
            ClassMetrics(name, int((shown > 0).sum()), int(shown.sum()), **_precisions(precision[:, :, index, 0, -1]))
            for index, (name, shown) in enumerate(zip(truth.names, np.transpose(boxes), strict=True))
        ),
    )


def _precisions(precision: Floats) -> dict[str, float | None]:
    """The three means of precisions, IoU thresholds first."""
    return {"map50_95": _mean(precision), "map50": _mean(precision[0]), "map75": _mean(precision[5])}


def _mean(values: Floats) -> float | None:
    """Mean over the entries that are defined; pycocotools marks the others with -1."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None


def _coco(truth: EvalData, boxes: Iterable[tuple[int, int, Floats, dict[str, Any]]]) -> Any:
    """A COCO object of boxes (image, class, left top width height, more); by hand: loadRes refuses an empty list."""
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {
        "images": [{"id": number} for number in range(len(truth.images))],
        "categories": [{"id": number, "name": name} for number, name in enumerate(truth.names)],
        "annotations": [
            {"id": number, "image_id": image, "category_id": label, "bbox": box.tolist(), "iscrowd": 0, **more}
            for number, (image, label, box, more) in enumerate(boxes, 1)  # an id of 0 means "no match" in pycocotools
        ],
    }
    coco.createIndex()
    return coco
