"""Read the images and true boxes of one split, from YOLO format or COCO format, into one form.

Everything is checked while it is read; each error names the file, what was found there, what was expected, and what
to do. Nothing here imports Ultralytics or pycocotools, except to ask Ultralytics for its folder of data sets.
"""

from __future__ import annotations

from pathlib import Path

from fgd_hooks.evaldata.coco import read_coco
from fgd_hooks.evaldata.types import DataError, EvalData, Floats, NoSplitError, TrueImage
from fgd_hooks.evaldata.yolo import read_yolo

__all__ = ["DataError", "EvalData", "Floats", "NoSplitError", "TrueImage", "read_data"]


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
