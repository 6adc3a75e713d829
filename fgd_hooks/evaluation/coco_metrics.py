"""COCO metrics of detections, computed by pycocotools, as plain numbers and as tables."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fgd_hooks.errors import DataError
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
        return {**asdict(self), "per_class": [asdict(entry) for entry in self.per_class]}

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
    """Refuse a number of detections that pycocotools cannot judge by.

    Raises:
        DataError: fewer than 10.
    """
    if max_dets < 10:
        raise DataError(f"max_dets is {max_dets}; expected at least 10 (recall is also measured with 1 and 10)")


def coco_metrics(truth: EvalData, detections: Sequence[Floats], max_dets: int = 100) -> CocoMetrics:
    """Judge detections with pycocotools.

    Args:
        truth: images and true boxes.
        detections: one (n, 6) array per image of ``truth.images``, in its order: left, top, width, height in pixels of
            the original image, confidence, class index as in ``truth.names``.
        max_dets: detections per image and class that count, the most confident ones.

    Raises:
        ValueError: the number of arrays is not the number of images.
        DataError: ``max_dets`` is below 10.
    """
    if len(detections) != len(truth.images):
        raise ValueError(f"{len(detections)} arrays of detections for {len(truth.images)} images; give one per image")
    check_max_dets(max_dets)
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        judge = COCOeval(_coco_truth(truth), _coco_detections(truth, detections), "bbox")
        judge.params.maxDets = [1, 10, max_dets]
        judge.evaluate()
        judge.accumulate()
    precision: Floats = judge.eval["precision"]  # IoU threshold, recall, class, size (all, s, m, l), max detections
    recall: Floats = judge.eval["recall"]  # IoU threshold, class, size, max detections
    per_class = []
    for index, name in enumerate(truth.names):
        shown = [int(((image.labels == index) & ~image.crowd).sum()) for image in truth.images]
        own = precision[:, :, index, 0, -1]
        values = (_mean(own), _mean(own[0]), _mean(own[5]))
        per_class.append(ClassMetrics(name, sum(n > 0 for n in shown), sum(shown), *values))
    return CocoMetrics(
        map50_95=_mean(precision[..., 0, -1]),
        map50=_mean(precision[0, ..., 0, -1]),
        map75=_mean(precision[5, ..., 0, -1]),
        map_small=_mean(precision[..., 1, -1]),
        map_medium=_mean(precision[..., 2, -1]),
        map_large=_mean(precision[..., 3, -1]),
        ar_1=_mean(recall[..., 0, 0]),
        ar_10=_mean(recall[..., 0, 1]),
        ar=_mean(recall[..., 0, 2]),
        ar_small=_mean(recall[..., 1, 2]),
        ar_medium=_mean(recall[..., 2, 2]),
        ar_large=_mean(recall[..., 3, 2]),
        images=len(truth.images),
        boxes=sum(int((~image.crowd).sum()) for image in truth.images),
        detections=sum(len(rows) for rows in detections),
        per_class=tuple(per_class),
    )


def _coco_truth(truth: EvalData) -> Any:
    """The true boxes as a pycocotools COCO object; images and classes are numbered from 1."""
    annotations = []
    for number, image in enumerate(truth.images, 1):
        for label, box, area, crowd in zip(image.labels, image.boxes, image.areas, image.crowd, strict=True):
            annotations.append(_annotation(number, int(label), box, float(area), int(crowd)))
    return _coco(truth, annotations)


def _coco_detections(truth: EvalData, detections: Sequence[Floats]) -> Any:
    """The detections as a pycocotools COCO object."""
    annotations = []
    for number, rows in enumerate(detections, 1):
        for row in rows:
            annotation = _annotation(number, int(row[5]), row[:4], float(row[2] * row[3]), 0)
            annotations.append({**annotation, "score": float(row[4])})
    return _coco(truth, annotations)


def _annotation(image: int, label: int, box: Floats, area: float, crowd: int) -> dict[str, Any]:
    bbox = [float(value) for value in box]
    return {"image_id": image, "category_id": label + 1, "bbox": bbox, "area": area, "iscrowd": crowd}


def _coco(truth: EvalData, annotations: list[dict[str, Any]]) -> Any:
    """A COCO object; built by hand because loadRes refuses an empty list of detections."""
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {
        "images": [{"id": i} for i in range(1, len(truth.images) + 1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(truth.names, 1)],
        "annotations": [{**annotation, "id": i} for i, annotation in enumerate(annotations, 1)],
    }
    coco.createIndex()
    return coco


def _mean(values: Floats) -> float | None:
    """Mean over the entries that are defined; pycocotools marks the others with -1."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None
