"""Read the images and true boxes of one split, from YOLO format or COCO format, into one form.

Everything is checked while it is read; each error names the file, what was found there, what was expected, and what
to do. Nothing here imports Ultralytics or pycocotools, except to ask Ultralytics for its folder of data sets.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fgd_hooks.errors import DataError, NoSplitError
from fgd_hooks.evaluation.dataset import EvalData, Floats, TrueImage, image_size, shorten, true_image


def read_data(data: str | Path, split: str = "val", images: str | Path | None = None) -> EvalData:
    """Read a data yaml (YOLO format) or an annotation json (COCO format).

    Args:
        data: the yaml or json file.
        split: key of the yaml that names the images (``train``, ``val``, ``test``); not used for a json.
        images: folder of the images, for a json only; without it the usual places beside the json are searched.

    Raises:
        FileNotFoundError: the file, the split's images or all labels are missing.
        DataError: the file or a label in it is malformed, or there is no box at all.
    """
    file = Path(data)
    if file.suffix.lower() not in (".yaml", ".yml", ".json"):
        raise DataError(f"data={data!s}: expected a .yaml file (YOLO format) or a .json file (COCO format)")
    if not file.is_file():
        raise FileNotFoundError(
            f"data file {file} not found (looked in {Path.cwd()}); give the path of a data yaml or of a COCO json"
        )
    if file.suffix.lower() == ".json":
        result = read_coco(file, images)
    elif images is not None:
        raise DataError(f"images={images} goes with a COCO json; {file} names its images itself, under '{split}'")
    else:
        result = read_yolo(file, split)
    if not any(len(image.labels) for image in result.images):
        raise DataError(f"{file}: {len(result.images)} images but not one box; nothing to measure against")
    return result


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
    boxes: dict[int, list[dict[str, Any]]] = {int(image["id"]): [] for image in content["images"]}
    if len(boxes) != len(content["images"]):
        raise DataError(f"{file}: {len(content['images'])} images share {len(boxes)} ids; every image needs its own id")
    for each in content["annotations"]:
        if each["image_id"] not in boxes:
            raise DataError(f"{file}: annotation {each.get('id')} is of image {each['image_id']}, not listed")
        if each["category_id"] not in ids:
            raise DataError(
                f"{file}: annotation {each.get('id')} has category_id {each['category_id']}; "
                f"the file's categories are {shorten(ids)}"
            )
        boxes[each["image_id"]].append(each)
    folder = _coco_folder(file, [str(image["file_name"]) for image in content["images"]], images)
    result = tuple(_coco_image(file, folder, image, boxes[int(image["id"])], ids) for image in content["images"])
    return EvalData(file, tuple(str(each["name"]) for each in categories), tuple(ids), result, by_name=True)


def _coco_image(
    file: Path, folder: Path, image: dict[str, Any], boxes: list[dict[str, Any]], ids: list[int]
) -> TrueImage:
    """One image of an annotation json with its boxes."""
    found = folder / str(image["file_name"])
    width, height = image_size(found)
    if {"width", "height"} <= image.keys() and (image["width"], image["height"]) != (width, height):
        raise DataError(
            f"{found} is {width}x{height} pixels, {file} says {image['width']}x{image['height']}: not the image "
            "that was annotated, or resized since"
        )
    rectangles = np.array([each["bbox"] for each in boxes], dtype=np.float64).reshape(-1, 4)
    areas = np.array([each.get("area", each["bbox"][2] * each["bbox"][3]) for each in boxes], dtype=np.float64)
    crowd = np.array([bool(each.get("iscrowd", 0)) for each in boxes], dtype=np.bool_)
    labels = [ids.index(each["category_id"]) for each in boxes]
    return true_image(found, width, height, labels, rectangles, areas, crowd)


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


_IMAGE_SUFFIXES = frozenset(
    (".avif", ".bmp", ".dng", ".heic", ".jp2", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp")
)

_TOLERANCE = 0.01  # how far a normalised coordinate may lie outside 0..1, as in Ultralytics


def read_yolo(file: Path, split: str) -> EvalData:
    """Read one split of a data yaml."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8", errors="ignore"))
    except yaml.YAMLError as error:
        raise DataError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected keys such as 'val' and 'names', found {type(content).__name__}")
    names = _yolo_names(file, content)
    if split == "val" and "val" not in content and "validation" in content:
        split = "validation"
    if not content.get(split):
        present = [k for k in ("train", "val", "test", "minival") if content.get(k)]
        raise NoSplitError(
            f"{file} has no split '{split}'; it has {present}. Choose one of them or add '{split}: FOLDER'"
        )
    files = _image_files(_split_paths(file, content, split))
    if not files:
        raise FileNotFoundError(
            f"{file}: no images under '{split}: {content[split]}'; expected files such as .jpg or .png, "
            "a folder of them, or a .txt list of them"
        )
    label_files = [label_file(image) for image in files]
    if not any(label.is_file() for label in label_files):
        raise FileNotFoundError(
            f"{file}: none of the {len(files)} images of '{split}' has a label file; {files[0]} should have "
            f"{label_files[0]} (one line per box: class x_centre y_centre width height, each 0..1)"
        )
    images = [_yolo_image(image, label, len(names)) for image, label in zip(files, label_files, strict=True)]
    return EvalData(file, names, tuple(range(len(names))), tuple(images), by_name=False)


def _yolo_names(file: Path, content: dict[str, Any]) -> tuple[str, ...]:
    """Class names of a data yaml, by id; ids must run from 0 without a gap."""
    names, count = content.get("names"), content.get("nc")
    if names is None:
        if not isinstance(count, int):
            raise DataError(f"{file}: expected 'names' (list, or id: name), or at least 'nc' (number of classes)")
        return tuple(f"class_{i}" for i in range(count))
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or sorted(names) != list(range(len(names))):
        raise DataError(f"{file}: 'names' must be a list, or number 0 to n-1 without a gap; found {names!r}")
    if count is not None and count != len(names):
        raise DataError(f"{file}: 'nc: {count}' but 'names' has {len(names)} entries; remove 'nc' or mend one of them")
    return tuple(str(names[i]) for i in range(len(names)))


def _split_paths(file: Path, content: dict[str, Any], split: str) -> list[Path]:
    """Existing folders or files of a split; `path` counts from the yaml, the working folder, Ultralytics' data sets."""
    entries = content[split] if isinstance(content[split], list) else [content[split]]
    root = Path(str(content.get("path") or ""))
    bases = []
    datasets = [_ultralytics_datasets] if importlib.util.find_spec("ultralytics") else []
    for find in (lambda: file.resolve().parent, Path.cwd, *datasets):
        bases.append(find() / root)  # where root is absolute, it alone counts
        found = [bases[-1] / str(entry) for entry in entries]
        if all(path.exists() for path in found):
            return found
        if root.is_absolute():
            break
    tried = ", ".join(str(base / str(entries[0])) for base in bases)
    hint = (
        "; the yaml has a 'download' entry: run Ultralytics once on it to fetch the data"
        if "download" in content
        else ""
    )
    raise FileNotFoundError(
        f"{file}: '{split}: {content[split]}' does not exist; tried {tried}. Mend 'path' or '{split}'{hint}"
    )


def _ultralytics_datasets() -> Path:
    """The folder of Ultralytics' settings in which it looks for data sets."""
    from ultralytics.utils import DATASETS_DIR

    return Path(DATASETS_DIR)


def _image_files(paths: Iterable[Path]) -> list[Path]:
    """All images of folders (with sub-folders), .txt lists and single files, sorted."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += [f for f in path.rglob("*") if f.suffix.lower() in _IMAGE_SUFFIXES]
        elif path.suffix.lower() == ".txt":
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            # Relative entries count from the list's folder, or else from the working folder.
            listed = [path.parent / line if (path.parent / line).is_file() else Path(line) for line in lines]
            missing = [f for f in listed if not f.is_file()]
            if missing:
                raise FileNotFoundError(
                    f"{path}: {len(missing)} of {len(listed)} listed images do not exist, the first is {missing[0]}"
                )
            files += listed
        elif path.suffix.lower() in _IMAGE_SUFFIXES:
            files.append(path)
    return sorted(files)


def label_file(image: Path) -> Path:
    """Where YOLO format keeps the labels of an image: the last ``images`` folder of its path becomes ``labels``."""
    parts = list(image.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _yolo_image(image: Path, label: Path, classes: int) -> TrueImage:
    """One image with the boxes of its label file; no file means no box."""
    width, height = image_size(image)
    rows = _label_rows(label, classes) if label.is_file() else np.zeros((0, 5))
    boxes = rows[:, 1:] * np.array([width, height, width, height], dtype=np.float64)
    boxes[:, :2] -= boxes[:, 2:] / 2
    return true_image(image, width, height, rows[:, 0], boxes)


def _label_rows(file: Path, classes: int) -> Floats:
    """Rows (class, x, y, w, h) of a label file; outlines become the boxes around them, equal rows count once."""
    lines = enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1)
    rows = [_label_row(line, f"{file}:{number}", classes) for number, line in lines if line.strip()]
    if not rows:
        return np.zeros((0, 5))
    # Ultralytics drops a row that is there twice (compared as 32-bit floats), so it does not count here either.
    _, first = np.unique(np.array(rows, dtype=np.float32), axis=0, return_index=True)
    kept: Floats = np.array(rows, dtype=np.float64)[np.sort(first)]
    return kept


def _label_row(line: str, where: str, classes: int) -> list[float]:
    try:
        label, *values = map(float, line.split())
    except ValueError:
        raise DataError(f"{where}: expected numbers, found {line.strip()!r}") from None
    if len(values) > 5 and len(values) % 2 == 0:  # an outline: x1 y1 x2 y2 x3 y3 ...
        left, right, top, bottom = min(values[::2]), max(values[::2]), min(values[1::2]), max(values[1::2])
        values = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
    if len(values) != 4:
        found = len(values) + 1
        raise DataError(f"{where}: expected 5 numbers (class x_centre y_centre width height), found {found}")
    if label % 1 or not 0 <= label < classes:
        raise DataError(
            f"{where}: class {line.split()[0]} but the data yaml names {classes} classes, 0 to {classes - 1}; "
            "ids start at 0 in YOLO format"
        )
    if not all(-_TOLERANCE <= value <= 1 + _TOLERANCE for value in values) or min(values[2:]) < 0:
        raise DataError(
            f"{where}: coordinates must be parts of the image between 0 and 1, found {line.strip()!r}; "
            "divide pixels by the image's width and height"
        )
    return [label, *values]
