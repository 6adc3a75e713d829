"""Read the annotation json of COCO format and find its images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fgd_hooks.evaldata.types import DataError, EvalData, image_size, shorten, true_image


def read_coco(file: Path, images: str | Path | None) -> EvalData:
    """Read an annotation json."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{file} is not valid JSON: {error}") from error
    missing = [k for k in ("images", "annotations", "categories") if not isinstance(content, dict) or k not in content]
    if missing:
        raise DataError(f"{file}: expected a COCO file with images, annotations and categories; {missing} missing")
    if not content["images"]:
        raise DataError(f"{file}: its list 'images' is empty")
    categories = sorted(content["categories"], key=lambda category: int(category["id"]))
    ids = [int(category["id"]) for category in categories]
    index = {identifier: position for position, identifier in enumerate(ids)}
    folder = _coco_folder(file, [str(image["file_name"]) for image in content["images"]], images)
    boxes: dict[int, list[dict[str, Any]]] = {int(image["id"]): [] for image in content["images"]}
    if len(boxes) != len(content["images"]):
        raise DataError(f"{file}: {len(content['images'])} images share {len(boxes)} ids; every image needs its own id")
    for annotation in content["annotations"]:
        if annotation["image_id"] not in boxes:
            raise DataError(
                f"{file}: annotation {annotation.get('id')} is of image {annotation['image_id']}, not listed"
            )
        if annotation["category_id"] not in index:
            raise DataError(
                f"{file}: annotation {annotation.get('id')} has category_id {annotation['category_id']}; "
                f"the file's categories are {shorten(ids)}"
            )
        boxes[annotation["image_id"]].append(annotation)
    result = []
    for image in content["images"]:
        own = boxes[int(image["id"])]
        found = folder / str(image["file_name"])
        width, height = image_size(found)
        if {"width", "height"} <= image.keys() and (image["width"], image["height"]) != (width, height):
            raise DataError(
                f"{found} is {width}x{height} pixels, {file} says {image['width']}x{image['height']}: not the image "
                "that was annotated, or resized since"
            )
        rectangles = np.array([a["bbox"] for a in own], dtype=np.float64).reshape(-1, 4)
        areas = np.array([a.get("area", a["bbox"][2] * a["bbox"][3]) for a in own], dtype=np.float64)
        crowd = np.array([bool(a.get("iscrowd", 0)) for a in own], dtype=np.bool_)
        labels = [index[a["category_id"]] for a in own]
        result.append(true_image(found, width, height, labels, rectangles, areas, crowd))
    names = tuple(str(category["name"]) for category in categories)
    return EvalData(file, names, tuple(ids), tuple(result), by_name=True)


def _coco_folder(file: Path, names: Sequence[str], images: str | Path | None) -> Path:
    """The folder under which all images of a json lie."""
    if images is not None:
        candidates = [Path(images)]
    else:
        part = file.stem.split("_")[-1]  # instances_val2017.json -> val2017
        above = file.resolve().parent.parent
        bases = [file.resolve().parent, above, above / "images"]
        candidates = [*bases, *(base / part for base in bases), file.resolve().parent / "images"]
    for folder in candidates:
        if (folder / names[0]).is_file():
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise FileNotFoundError(
                    f"{file}: {len(missing)} of {len(names)} images are missing in {folder}, the first is {missing[0]}"
                )
            return folder
    raise FileNotFoundError(
        f"{file}: image {names[0]} not found in {', '.join(str(c) for c in candidates)}; give images=FOLDER"
    )
