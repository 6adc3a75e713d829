"""The trainers' own folder on the path, as Python sets it for a program, and a tiny data set of COCO format."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[2]
IDS = {3: (255, 0, 0), 7: (0, 255, 0)}  # category ids with a gap, and what their rectangles look like
SPLITS = {"train": 5, "val": 2, "test": 2}


@pytest.fixture(autouse=True)
def trainers_on_the_path(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "trainers"), *sys.path])


@pytest.fixture(scope="session")
def coco(tmp_path_factory):
    """A folder with images/SPLIT and annotations/instances_SPLIT.json; images of two sizes, two boxes in each."""
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    for split, count in SPLITS.items():
        (root / "images" / split).mkdir(parents=True)
        images, annotations = [], []
        for number in range(count):
            width, height = ((80, 64), (64, 72))[number % 2]
            image = Image.new("RGB", (width, height))
            for position, (category, colour) in enumerate(IDS.items()):
                x, y = 4 + 3 * number, 4 + 28 * position
                ImageDraw.Draw(image).rectangle((x, y, x + 23, y + 23), fill=colour)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number + 10,
                        "category_id": category,
                        "bbox": [x, y, 24, 24],
                        "area": 576,
                        "iscrowd": 0,
                    }
                )
            name = f"{split}{number}.png"
            image.save(root / "images" / split / name)
            images.append({"id": number + 10, "file_name": name, "width": width, "height": height})
        content = {"images": images, "annotations": annotations}
        content["categories"] = [{"id": category, "name": f"class{category}"} for category in IDS]
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def data_settings(coco) -> dict[str, str]:
    """The section ``data`` for this folder."""
    return {"root": str(coco), **{split: f"annotations/instances_{split}.json" for split in SPLITS}}
