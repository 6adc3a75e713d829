"""COCO metrics of an Ultralytics detection model: the engine of ``fgd eval``.

Ultralytics' own validator makes the detections, pycocotools judges them. The validator's own two figures are kept
beside and differ a little; docs/evaluation.md says by how much, and why. Both average over the classes that have at
least one true box. Small, medium and large mean areas below 32^2, up to 96^2 and above, in pixels of the original
image; a class without a box of that size does not enter that mean. In YOLO format the area is the box's, in COCO format
what the file says (the mask's, where it has masks).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fgd_hooks.errors import DataError, needs_extra
from fgd_hooks.evaluation.coco_metrics import CocoMetrics, check_max_dets, coco_metrics
from fgd_hooks.evaluation.dataset import EvalData, Floats, linked_copy, shorten
from fgd_hooks.evaluation.readers import quiet_ultralytics, read_data
from fgd_hooks.evaluation.reporting import percent
from fgd_hooks.evaluation.runs import weights_of

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

Match = Literal["name", "order"]


@dataclass(frozen=True)
class Evaluation(CocoMetrics):
    """COCO metrics of one model on one split, and how they were measured.

    Attributes:
        model: file of the model, or its description.
        data: file of the data set.
        split: of the data yaml; empty for a COCO json.
        imgsz: input size in pixels.
        nms: None or True: one-to-many head with non-maximum suppression; False: the NMS-free head.
        left_out: images and boxes that could not be used, as in a training.
        ultralytics_map50_95: what Ultralytics' own validator makes of the same detections.
        ultralytics_map50: the same at IoU 0.50.
    """

    model: str
    data: str
    split: str
    imgsz: int
    nms: bool | None
    left_out: int
    ultralytics_map50_95: float
    ultralytics_map50: float

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table(f"{self.model} on {self.data} {self.split} at {self.imgsz} px, per cent")
        yield self.size_table()
        yield (
            f"Ultralytics' own validator on the same detections: mAP50-95 {percent(self.ultralytics_map50_95)}, "
            f"mAP50 {percent(self.ultralytics_map50)}"
        )


def evaluate(
    model: Any,
    data: str | Path | EvalData,
    *,
    split: str = "val",
    images: str | Path | None = None,
    imgsz: int | None = None,
    batch: int = 16,
    device: str | None = None,
    nms: bool | None = None,
    conf: float = 0.001,
    iou: float = 0.7,
    max_dets: int = 100,
    match: Match = "name",
    limit: int | None = None,
) -> Evaluation:
    """Measure a model with COCO metrics.

    Args:
        model: a model file (``.pt`` or another that Ultralytics loads) or a ``YOLO``/``RTDETR`` object, which is not
            changed.
        data: a data yaml of YOLO format, or the folder of one, a json of COCO format, or what ``read_data`` made of it.
        split: key of the yaml whose images to use; not used for a json.
        images: folder of the images of a json; by default looked for beside it.
        imgsz: input size in pixels; by default the one the model was trained with.
        batch: images per forward pass.
        device: as in Ultralytics ("cpu", "0"); by default the first GPU if there is one.
        nms: for end-to-end models such as YOLO26. None or True takes the one-to-many head with non-maximum suppression,
            which is what ``model.val()`` does by default; False takes the one-to-one head, which needs none and often
            measures a point or two differently. No effect on models that have one head only.
        conf: least confidence of a detection that counts.
        iou: IoU above which non-maximum suppression drops the weaker of two boxes.
        max_dets: detections per image and class that pycocotools counts.
        match: how the data's classes go with the model's. ``name``: same names, which for a COCO json may come in
            another order; ``order``: first with first, whatever the names (a json's categories by ascending id).
        limit: measure on this many images only, evenly spread over the split; None: on all.

    Raises:
        FileNotFoundError: model, data file, images or labels are missing; the message says where they were looked for.
        DataError: the data are malformed, the classes of model and data do not go together, or ``max_dets`` is below
            10.
    """
    check_max_dets(max_dets)
    truth = _some_images(data if isinstance(data, EvalData) else read_data(data, split, images), limit)
    yolo = load_detector(model)
    names = {int(k): str(v) for k, v in dict(yolo.names).items()}
    truth = _without_empty_categories(truth, set(names.values()))
    to_model = _class_map(truth, names, match)
    arguments: dict[str, Any] = {"batch": batch, "conf": conf, "iou": iou}
    arguments.update({k: v for k, v in (("imgsz", imgsz), ("device", device), ("nms", nms)) if v is not None})
    with tempfile.TemporaryDirectory(prefix="fgd_eval_") as folder, quiet_ultralytics():
        found, host, size = _detect(yolo, truth, to_model, names, Path(folder), arguments)
    metrics = coco_metrics(truth, found, max_dets=max_dets)
    values = {name: getattr(metrics, name) for name in CocoMetrics.__dataclass_fields__}
    file = weights_of(model) if isinstance(model, (str, Path)) else getattr(yolo, "ckpt_path", None)
    return Evaluation(
        **values,
        model=str(file or yolo.model_name),
        data=str(truth.source if isinstance(data, EvalData) else data),
        split=split if not truth.by_name else "",
        imgsz=size,
        nms=nms,
        left_out=len(truth.left_out),
        ultralytics_map50_95=host[0],
        ultralytics_map50=host[1],
    )


def _some_images(truth: EvalData, limit: int | None) -> EvalData:
    """At most ``limit`` images, evenly spread, one of them with a box."""
    count = len(truth.images)
    if limit is None or limit >= count:
        return truth
    if limit < 1:
        raise DataError(f"limit is {limit}; expected a number of images, 1 or more")
    images = tuple(truth.images[number * count // limit] for number in range(limit))
    if not any(len(image.labels) for image in images):
        raise DataError(f"{truth.source}: {limit} of {count} images, evenly spread, have no box; raise the limit")
    return replace(truth, images=images)


def load_detector(model: Any) -> Any:
    """An Ultralytics model from a file, or the object itself; a detector in either case.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it cannot be loaded, or is no detector.
    """
    if isinstance(model, (str, Path)):
        model = _load(str(weights_of(model)))
    elif not hasattr(model, "val"):
        raise DataError(f"model: expected a file or an ultralytics YOLO object, got {type(model).__name__}")
    task = getattr(model, "task", None)
    if task != "detect":
        raise DataError(f"the model's task is {task!r}; only detection models ('detect') can be evaluated here")
    return model


def _load(file: str) -> Any:
    """An Ultralytics model from a file."""
    with needs_extra("ultralytics"):
        from ultralytics import YOLO
        from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

    # The names of official weights alone may be fetched by Ultralytics; a misspelt path must not look like one.
    if not Path(file).exists() and file not in GITHUB_ASSETS_NAMES:
        raise FileNotFoundError(
            f"model file {file} not found (looked in {Path.cwd()}); give the path of a trained model, "
            "for example runs/detect/train/weights/best.pt"
        )
    if Path(file).suffix in (".yaml", ".yml"):
        raise DataError(f"{file} describes a model without weights; give trained weights, a .pt file")
    try:
        with quiet_ultralytics():
            return YOLO(file)
    except Exception as error:
        raise DataError(f"{file} cannot be loaded as an Ultralytics model: {' '.join(str(error).split())}") from error


def _without_empty_categories(truth: EvalData, known: set[str]) -> EvalData:
    """Without a COCO file's categories that have no box and that the model does not know (Roboflow writes one)."""
    used = {int(label) for image in truth.images for label in image.labels}
    kept = [number for number, name in enumerate(truth.names) if number in used or name in known]
    if not truth.by_name or len(kept) == len(truth.names) or len(truth.names) <= len(known):
        return truth
    images = tuple(replace(each, labels=np.searchsorted(kept, each.labels)) for each in truth.images)
    names, ids = tuple(truth.names[number] for number in kept), tuple(truth.ids[number] for number in kept)
    return replace(truth, names=names, ids=ids, images=images)


def _class_map(truth: EvalData, names: dict[int, str], match: Match) -> dict[int, int]:
    """Class index of the data -> class index of the model."""
    if match not in ("name", "order"):
        raise DataError(f"match must be 'name' or 'order', got {match!r}")
    ours, ids, theirs = list(truth.names), sorted(names), [names[key] for key in sorted(names)]
    if len(ours) != len(theirs):
        raise DataError(
            f"{truth.source} has {len(ours)} classes ({shorten(ours)}), the model has {len(theirs)} "
            f"({shorten(theirs)}); evaluate on data with the classes that the model was trained on"
        )
    if match == "order" or ours == theirs:
        return dict(enumerate(ids))
    if sorted(ours) != sorted(theirs) or len(set(theirs)) != len(theirs):
        unknown = [name for name in ours if name not in theirs]
        raise DataError(
            f"{truth.source} has classes the model does not know by that name ({shorten(unknown or ours)}); "
            f"the model's are {shorten(theirs)}. Rename them in the data, or pass match='order' where they mean the "
            "same in the same order"
        )
    if not truth.by_name:
        raise DataError(
            f"{truth.source} numbers the classes {_numbered(truth.ids, ours)}, the model {_numbered(ids, theirs)}; the "
            "class ids of the labels mean other classes than the model's. Renumber the labels"
        )
    return {index: ids[theirs.index(name)] for index, name in enumerate(ours)}


def _detect(
    yolo: Any,
    truth: EvalData,
    to_model: dict[int, int],
    names: dict[int, str],
    folder: Path,
    arguments: dict[str, Any],
) -> tuple[list[Floats], tuple[float, float], int]:
    """What Ultralytics' validator detects, one array per image as `coco_metrics` takes them, its mAP, the input size.

    The images are linked into ``folder`` beside labels written anew, so that both formats go the same way and nothing
    (labels cache, results) is written into the user's folders.
    """
    own = getattr(yolo.model, "yaml", None) or {}
    yaml_file, position = linked_copy(truth, to_model, names, folder, int(own.get("channels") or 3))
    from_model = {theirs: ours for ours, theirs in to_model.items()}
    found: list[Floats] = [np.zeros((0, 6)) for _ in truth.images]
    seen: set[str] = set()
    sizes: list[int] = []
    base = yolo.task_map["detect"]["validator"]

    def update_metrics(self: Any, preds: Any, batch: Any) -> None:
        """Note the detections of a batch in pixels of the original images, then go on as always."""
        sizes.append(int(np.max(self.args.imgsz)))
        for index, prediction in enumerate(preds):
            prepared = self._prepare_batch(index, batch)
            scaled = self.scale_preds(prediction, prepared)
            boxes = scaled["bboxes"].cpu().double().numpy()
            boxes[:, 2:] -= boxes[:, :2]
            classes = np.array([from_model[int(c)] for c in scaled["cls"].tolist()], dtype=np.float64)
            confidence = scaled["conf"].cpu().double().numpy()
            seen.add(Path(prepared["im_file"]).name)
            found[position[Path(prepared["im_file"]).name]] = np.column_stack([boxes, confidence, classes])
        base.update_metrics(self, preds, batch)

    collector = type("CollectingValidator", (base,), {"update_metrics": update_metrics})
    metrics = yolo.val(
        validator=collector,
        data=str(yaml_file),
        split="val",
        project=str(folder / "results"),
        name="val",
        plots=False,
        verbose=False,
        save_json=False,
        **arguments,
    )
    if unread := sorted(position.keys() - seen):
        file = truth.images[position[unread[0]]].file
        raise DataError(f"{truth.source}: Ultralytics cannot read {len(unread)} of its images, the first is {file}")
    return found, (float(metrics.box.map), float(metrics.box.map50)), sizes[0]


def _numbered(ids: Sequence[int], names: Sequence[str]) -> str:
    """`0: disc, 1: ring`."""
    return shorten([f"{i}: {name}" for i, name in zip(ids, names, strict=True)])
