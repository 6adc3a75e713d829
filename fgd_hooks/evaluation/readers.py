"""Read the images and true boxes of one split, from YOLO format or COCO format, into one form.

What a training leaves out (an image that is gone or cannot be read, a label file with an impossible box, an annotation
without one) is left out here, too, counted, and said: see ``EvalData.left_out``. Files and labels of YOLO format are
checked by Ultralytics' own code. What spoils the whole file is an error that names the file, what was found there, what
was expected, and what to do.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fgd_hooks.errors import DataError, NoSplitError, needs_extra
from fgd_hooks.evaluation.dataset import EvalData, TrueImage, image_size, true_image

logger = logging.getLogger("fgd_hooks")


def read_data(data: str | Path, split: str = "val", images: str | Path | None = None) -> EvalData:
    """Read a data yaml or a folder that holds one (YOLO format), or an annotation json (COCO format).

    Args:
        data: the yaml or json file, or the folder of the yaml; the bare name of a yaml that comes with Ultralytics
            (``coco8.yaml``) means that one.
        split: key of the yaml that names the images (``train``, ``val``, ``test``); not used for a json.
        images: folder of the images, for a json only; without it the usual places beside the json are searched.

    Raises:
        FileNotFoundError: the file, the split's images or all labels are missing.
        DataError: the file is malformed, or there is no box at all that can be used.
    """
    file = _data_file(Path(data))
    if file.suffix.lower() == ".json":
        result = _read_coco(file, images)
    elif images is not None:
        raise DataError(f"images={images} goes with a COCO json; {file} names its images itself, under '{split}'")
    else:
        result = _read_yolo(file, split)
    if not any(len(image.labels) for image in result.images):
        raise DataError(f"{file}: {len(result.images)} images but not one box; nothing to measure against{result.note}")
    if result.left_out:
        _say_once(f"{file}{result.note}")
    return result


@functools.cache
def _say_once(text: str) -> None:
    """A warning; not again where several models are measured on the same data."""
    logger.warning(text)


@contextlib.contextmanager
def quiet_ultralytics() -> Iterator[None]:
    """Let Ultralytics log errors only, and draw no progress bars, until the block ends."""
    from ultralytics.utils import LOGGER

    before = LOGGER.level
    LOGGER.setLevel(logging.ERROR)
    try:
        yield
    finally:
        LOGGER.setLevel(before)


def _data_file(file: Path) -> Path:
    """The file that ``data`` stands for."""
    if file.is_dir():
        found = sorted(each for each in file.iterdir() if each.suffix.lower() in (".yaml", ".yml"))
        if len(found) != 1:
            names = ", ".join(each.name for each in found) or "none"
            raise DataError(f"data={file} is a folder; expected one data yaml in it, found {names}")
        return found[0]
    if file.suffix.lower() not in (".yaml", ".yml", ".json"):
        raise DataError(f"data={file}: expected a .yaml file (YOLO format) or a .json file (COCO format)")
    if not file.is_file() and len(file.parts) == 1 and file.suffix != ".json":
        from ultralytics.utils import ROOT

        if (known := Path(ROOT) / "cfg" / "datasets" / file.name).is_file():
            return known
    if not file.is_file():
        raise FileNotFoundError(
            f"data file {file} not found (looked in {Path.cwd()}); give the path of a data yaml or of a COCO json"
        )
    return file


def _read_coco(file: Path, images: str | Path | None) -> EvalData:
    """Read an annotation json; ids are compared as texts, since some tools write them so."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON: {error}") from error
    keys = ("images", "annotations", "categories")
    missing = [key for key in keys if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        raise DataError(f"{file}: expected a COCO file with images, annotations and categories; {missing} missing")
    if not content["images"]:
        raise DataError(f"{file}: its list 'images' is empty")
    try:
        categories = sorted(content["categories"], key=lambda each: _number(each["id"]))
        classes = {str(each["id"]): number for number, each in enumerate(categories)}
        names = tuple(str(each["name"]) for each in categories)
        files = {
            str(each["id"]): os.path.normpath(str(each["file_name"]).replace("\\", "/")) for each in content["images"]
        }
        if len(files) != len(content["images"]):
            raise DataError(
                f"{file}: {len(content['images'])} images share {len(files)} ids; every image needs its own id"
            )
        boxes: dict[str, list[dict[str, Any]]] = {key: [] for key in files}
        left_out = []
        for each in content["annotations"]:
            if fault := _fault(each, files, classes):
                left_out.append(f"annotation {each.get('id')} {fault}")
            else:
                boxes[str(each["image_id"])].append(each)
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{file} is no COCO file: an entry has no {error}, or is no object") from error
    folder = _coco_folder(file, list(files.values()), images)
    read = []
    for image in content["images"]:
        key = str(image["id"])
        try:
            read.append(_coco_image(folder / files[key], image, boxes[key], classes))
        except DataError as error:
            left_out.append(str(error))
    ids = tuple(_number(each["id"]) for each in categories)
    return EvalData(file, names, ids, _some(file, read, left_out), by_name=True, left_out=tuple(left_out))


def _number(value: Any) -> int:
    """An id as a number, also where it is a text."""
    try:
        return int(value)
    except (TypeError, ValueError):
        raise DataError(f"category id {value!r} is no whole number") from None


def _fault(annotation: dict[str, Any], images: dict[str, str], classes: dict[str, int]) -> str:
    """What makes an annotation unusable; empty where nothing does."""
    if str(annotation.get("image_id")) not in images:
        return f"is of image {annotation.get('image_id')}, not listed"
    if str(annotation.get("category_id")) not in classes:
        return f"has category_id {annotation.get('category_id')}; the file's categories are {', '.join(classes)}"
    box = annotation.get("bbox")
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(each, (int, float)) for each in box)
    if not (numbers and all(map(math.isfinite, box)) and box[2] > 0 and box[3] > 0):  # type: ignore[arg-type,index]
        return f"has the bbox {box!s:.60}; expected [left, top, width, height]"
    return ""


def _coco_image(
    file: Path, image: dict[str, Any], boxes: Sequence[dict[str, Any]], classes: dict[str, int]
) -> TrueImage:
    """One image of an annotation json with its boxes."""
    width, height = image_size(file)
    said = image.get("width") or width, image.get("height") or height  # 0 and null say nothing
    if said != (width, height):
        raise DataError(
            f"{file} is {width}x{height} pixels, the json says {said[0]}x{said[1]}: not the image that was annotated, "
            "or resized since"
        )
    rectangles = np.array([each["bbox"] for each in boxes], dtype=np.float64).reshape(-1, 4)
    areas = np.array([each.get("area") or each["bbox"][2] * each["bbox"][3] for each in boxes], dtype=np.float64)
    crowd = np.array([bool(each.get("iscrowd")) for each in boxes], dtype=np.bool_)
    labels = [classes[str(each["category_id"])] for each in boxes]
    return true_image(file, width, height, labels, rectangles, areas, crowd)


def _coco_folder(file: Path, names: Sequence[str], images: str | Path | None) -> Path:
    """The folder under which the images of a json lie."""
    if images is not None:
        candidates = [Path(images)]
    else:
        part = file.stem.split("_")[-1]  # instances_val2017.json -> val2017
        above = file.resolve().parent.parent
        bases = [file.resolve().parent, above, above / "images"]
        candidates = [*bases, *(base / part for base in bases), file.resolve().parent / "images"]
    for folder in candidates:
        if any((folder / name).is_file() for name in names):
            return folder
    raise FileNotFoundError(
        f"{file}: image {names[0]} not found in {', '.join(str(c) for c in candidates)}; give images=FOLDER"
    )


def _some(file: Path, images: Sequence[TrueImage], left_out: Sequence[str]) -> tuple[TrueImage, ...]:
    """The images, at least one."""
    if not images:
        raise DataError(f"{file}: none of its images can be used. The first: {left_out[0]}")
    return tuple(images)


def _read_yolo(file: Path, split: str) -> EvalData:
    """Read one split of a data yaml; images and labels are checked by what checks them before a training."""
    with needs_extra("ultralytics"):
        from ultralytics.data.utils import img2label_paths, verify_image_label
        from ultralytics.utils import NUM_THREADS
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8", errors="ignore"))
    except yaml.YAMLError as error:
        raise DataError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
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
    labels = img2label_paths([str(each) for each in files])
    if not any(map(os.path.isfile, labels)):
        raise FileNotFoundError(
            f"{file}: none of the {len(files)} images of '{split}' has a label file; {files[0]} should have "
            f"{labels[0]} (one line per box: class x_centre y_centre width height, each 0..1)"
        )
    points = content.get("kpt_shape") or (0, 0)
    rest = ("", False, len(names), *points, False)  # no prefix, keypoints dropped, ..., not all classes in one
    with quiet_ultralytics(), ThreadPool(NUM_THREADS) as pool:
        checked = pool.map(verify_image_label, [(str(f), label, *rest) for f, label in zip(files, labels, strict=True)])
    images, left_out = [], []
    for name, rows, shape, *_, message in checked:
        if name is None:
            left_out.append(str(message).replace("ignoring corrupt image/label: ", ""))
            continue
        height, width = shape
        boxes = rows[:, 1:].astype(np.float64) * np.array([width, height, width, height])
        boxes[:, :2] -= boxes[:, 2:] / 2
        images.append(true_image(Path(name), int(width), int(height), rows[:, 0], boxes))
    ids = tuple(range(len(names)))
    return EvalData(file, names, ids, _some(file, images, left_out), by_name=False, left_out=tuple(left_out))


def _yolo_names(file: Path, content: dict[str, Any]) -> tuple[str, ...]:
    """Class names of a data yaml, by id; ids, also quoted ones, must run from 0 without a gap."""
    names, count = content.get("names"), content.get("nc")
    if names is None:
        if not isinstance(count, int):
            raise DataError(f"{file}: expected 'names' (list, or id: name), or at least 'nc' (number of classes)")
        return tuple(f"class_{i}" for i in range(count))
    if count is not None and isinstance(names, (list, dict)) and str(count) != str(len(names)):
        raise DataError(f"{file}: 'nc: {count}' but 'names' has {len(names)} entries; remove 'nc' or mend one of them")
    found = dict(enumerate(names)) if isinstance(names, list) else names
    with contextlib.suppress(AttributeError, TypeError, ValueError, KeyError):
        found = {int(key): str(name) for key, name in found.items()}
        return tuple(found[number] for number in range(len(names)))
    raise DataError(f"{file}: 'names' must be a list, or number 0 to n-1 without a gap; found {names!r:.200}")


def _split_paths(file: Path, content: dict[str, Any], split: str) -> list[Path]:
    """Existing folders or files of a split.

    As in Ultralytics ``path`` counts from the working folder or from its folder of data sets, and a ``../`` that leads
    nowhere is dropped (Roboflow's exports have one); else ``path`` counts from the yaml's folder.
    """
    from ultralytics.utils import DATASETS_DIR

    entries = [str(each) for each in (content[split] if isinstance(content[split], list) else [content[split]])]
    root, beside = Path(str(content.get("path") or "")), file.resolve().parent
    bases = dict.fromkeys(
        [Path.cwd() / root, Path(DATASETS_DIR) / root, beside / root] if content.get("path") else [beside]
    )
    for base in bases:
        found = [base / each if (base / each).exists() else base / each.removeprefix("../") for each in entries]
        if all(path.exists() for path in found):
            return found
    tried = ", ".join(dict.fromkeys(str(base / entries[0]) for base in bases))
    hint = "; the yaml has a 'download' entry: a training fetches the data" if "download" in content else ""
    raise FileNotFoundError(
        f"{file}: '{split}: {content[split]}' does not exist; tried {tried}. Mend 'path' or '{split}'{hint}"
    )


def _image_files(paths: Iterable[Path]) -> list[Path]:
    """All images of folders (with sub-folders), of lists (one a line) and single ones, sorted; some may not exist."""
    from ultralytics.data.utils import IMG_FORMATS

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += [f for f in path.rglob("*") if f.suffix[1:].lower() in IMG_FORMATS]
        elif path.suffix[1:].lower() in IMG_FORMATS:
            files.append(path)
        else:  # relative entries count from the list's folder, or else from the working folder
            lines = map(str.strip, path.read_text(encoding="utf-8-sig", errors="replace").splitlines())
            listed = [(path.parent / line, Path(line)) for line in lines if line]
            files += [near if near.is_file() or not far.is_file() else far for near, far in listed]
    return sorted(files)
