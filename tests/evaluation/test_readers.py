"""Reading images and boxes from YOLO and COCO format, and what it says about data it cannot read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fgd_hooks.errors import DataError
from fgd_hooks.evaluation.readers import read_data


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    """Two images of 40 x 20 pixels with one box each, and a data yaml beside them."""
    for name, row in (("one", "0 0.5 0.5 0.5 0.5"), ("two", "1 0.25 0.5 0.1 0.2")):
        for kind in ("images", "labels"):
            (tmp_path / kind / "val").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 20)).save(tmp_path / "images" / "val" / f"{name}.png")
        (tmp_path / "labels" / "val" / f"{name}.txt").write_text(row + "\n")
    file = tmp_path / "data.yaml"
    file.write_text("train: images/train\nval: images/val\nnames: [cat, dog]\n")
    return file


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """One image of 40 x 20 pixels with a box, category 9, and a crowd region, category 4."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 20)).save(tmp_path / "images" / "one.png")
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations" / "instances_val.json"
    file.write_text(
        json.dumps(
            {
                "images": [{"id": 5, "file_name": "one.png", "width": 40, "height": 20}],
                "annotations": [
                    {"id": 1, "image_id": 5, "category_id": 9, "bbox": [10, 5, 20, 10], "area": 120, "iscrowd": 0},
                    {"id": 2, "image_id": 5, "category_id": 4, "bbox": [0, 0, 4, 4], "iscrowd": 1},
                ],
                "categories": [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}],
            }
        )
    )
    return file


def edit(file: Path, **changes: Any) -> None:
    """Replace entries of a json file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_yolo_rows_become_pixels(yolo: Path) -> None:
    data = read_data(yolo)
    assert data.names == ("cat", "dog")
    assert [image.file.name for image in data.images] == ["one.png", "two.png"]
    np.testing.assert_allclose(data.images[0].boxes, [[10, 5, 20, 10]])
    assert data.images[0].areas.tolist() == [200]
    assert [image.labels.tolist() for image in data.images] == [[0], [1]]


@pytest.mark.parametrize("entry", ["images/val", ["images/val/one.png", "images/val/two.png"], "list.txt", "."])
def test_a_split_may_be_a_folder_a_list_or_a_text_file(yolo: Path, entry: str | list[str]) -> None:
    (yolo.parent / "list.txt").write_text("./images/val/two.png\nimages/val/one.png\n")
    yolo.write_text(f"val: {json.dumps(entry)}\nnames: {{0: cat, 1: dog}}\n")
    assert [image.file.name for image in read_data(yolo).images] == ["one.png", "two.png"]


def test_path_counts_from_the_yaml_not_from_the_working_folder(
    yolo: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    yolo.write_text("path: .\n" + yolo.read_text())
    assert len(read_data(yolo).images) == 2
    yolo.write_text(f"path: {yolo.parent}\nval: images/val\nnames: [cat, dog]\n")
    assert len(read_data(yolo).images) == 2


def test_outlines_become_boxes_and_equal_rows_count_once(yolo: Path) -> None:
    label = yolo.parent / "labels" / "val" / "one.txt"
    label.write_text("0 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75\n")
    np.testing.assert_allclose(read_data(yolo).images[0].boxes, [[10, 5, 20, 10]])
    label.write_text("1 0.5 0.5 0.5 0.5\n0 0.5 0.5 0.5 0.5\n1 0.5 0.5 0.5 0.5\n")
    assert read_data(yolo).images[0].labels.tolist() == [1, 0]


def test_an_image_without_label_file_is_background(yolo: Path) -> None:
    (yolo.parent / "labels" / "val" / "one.txt").unlink()
    assert [len(image.labels) for image in read_data(yolo).images] == [0, 1]


def test_labels_beside_the_images_where_no_folder_is_called_images(tmp_path: Path) -> None:
    Image.new("RGB", (10, 10)).save(tmp_path / "a.v2.png")
    (tmp_path / "a.v2.txt").write_text("0 0.5 0.5 1 1\n")
    (tmp_path / "data.yaml").write_text("val: .\nnames: [cat]\n")
    assert read_data(tmp_path / "data.yaml").images[0].boxes.tolist() == [[0, 0, 10, 10]]


def test_exif_orientation_turns_width_and_height(yolo: Path) -> None:
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[274] = 6
    image.save(yolo.parent / "images" / "val" / "one.png", exif=exif)
    assert (read_data(yolo).images[0].width, read_data(yolo).images[0].height) == (20, 40)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("0 0.5 0.5 0.5", ["one.txt:1", "expected 5 numbers", "found 4"]),
        ("zero 0.5 0.5 0.5 0.5", ["one.txt:1", "expected numbers"]),
        ("2 0.5 0.5 0.5 0.5", ["one.txt:1", "class 2", "0 to 1"]),
        ("-1 0.5 0.5 0.5 0.5", ["one.txt:1", "class -1"]),
        ("0.5 0.5 0.5 0.5 0.5", ["one.txt:1", "class 0.5"]),
        ("0 20 10 20 10", ["one.txt:1", "between 0 and 1", "divide"]),
        ("0 0.5 0.5 -0.005 0.5", ["one.txt:1", "between 0 and 1"]),
        ("0 nan 0.5 0.5 0.5", ["one.txt:1", "between 0 and 1"]),
    ],
)
def test_a_bad_label_row_is_named(yolo: Path, row: str, words: list[str]) -> None:
    (yolo.parent / "labels" / "val" / "one.txt").write_text(row + "\n")
    with pytest.raises(DataError) as error:
        read_data(yolo)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ("[1, 2]", DataError, ["expected keys", "list"]),
        ("val: [", DataError, ["not valid YAML"]),
        ("val: images/val", DataError, ["'names'"]),
        ("val: images/val\nnames: {1: cat, 2: dog}", DataError, ["0 to n-1"]),
        ("val: images/val\nnc: 3\nnames: [cat, dog]", DataError, ["nc: 3", "2 entries"]),
        ("train: images/val\nnames: [cat, dog]", DataError, ["no split 'val'", "train"]),
        ("val: images/nowhere\nnames: [cat, dog]", FileNotFoundError, ["nowhere", "tried"]),
        ("val: labels\nnames: [cat, dog]", FileNotFoundError, ["no images", "labels"]),
    ],
)
def test_a_bad_yaml_is_explained(yolo: Path, content: str, error: type[Exception], words: list[str]) -> None:
    yolo.write_text(content)
    with pytest.raises(error) as caught:
        read_data(yolo)
    assert all(word in str(caught.value) for word in words), caught.value


def test_missing_things_are_named(yolo: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing.yaml not found"):
        read_data(yolo.parent / "nothing.yaml")
    with pytest.raises(DataError, match=r"expected a \.yaml file"):
        read_data(yolo.parent / "images")
    with pytest.raises(DataError, match="goes with a COCO json"):
        read_data(yolo, images="images")
    for label in (yolo.parent / "labels" / "val").iterdir():
        label.write_text("")
    with pytest.raises(DataError, match="2 images but not one box"):
        read_data(yolo)
    for label in (yolo.parent / "labels" / "val").iterdir():
        label.unlink()
    with pytest.raises(FileNotFoundError, match=r"none of the 2 images.*labels.val.one\.txt"):
        read_data(yolo)


def test_an_unreadable_image_is_named(yolo: Path) -> None:
    (yolo.parent / "images" / "val" / "one.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"one\.png cannot be read"):
        read_data(yolo)


def test_a_list_with_missing_images_is_named(yolo: Path) -> None:
    (yolo.parent / "list.txt").write_text("images/val/one.png\nimages/val/gone.png\n")
    yolo.write_text("val: list.txt\nnames: [cat, dog]\n")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 listed images.*gone\.png"):
        read_data(yolo)


def test_coco_classes_come_in_the_order_of_their_ids(coco: Path) -> None:
    data = read_data(coco)
    assert (data.names, data.ids, data.by_name) == (("cat", "dog"), (4, 9), True)
    image = data.images[0]
    assert image.labels.tolist() == [1, 0]
    assert image.areas.tolist() == [120, 16]  # the file's area where it has one
    assert image.crowd.tolist() == [False, True]
    assert image.file == coco.parent.parent / "images" / "one.png"


def test_coco_images_may_lie_elsewhere(coco: Path) -> None:
    (coco.parent.parent / "images").rename(coco.parent.parent / "pictures")
    with pytest.raises(FileNotFoundError, match=r"one\.png not found in .*images=FOLDER"):
        read_data(coco)
    assert read_data(coco, images=coco.parent.parent / "pictures").images[0].file.is_file()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": []}, ["'images' is empty"]),
        ({"categories": [{"id": 9, "name": "dog"}]}, ["category_id 4", "categories are 9"]),
        (
            {"annotations": [{"id": 7, "image_id": 6, "category_id": 9, "bbox": [0, 0, 1, 1]}]},
            ["annotation 7", "image 6"],
        ),
        ({"images": [{"id": 5, "file_name": "one.png", "width": 80, "height": 40}]}, ["40x20", "80x40"]),
        ({"images": [{"id": 5, "file_name": "one.png"}] * 2}, ["2 images share 1 ids"]),
        ({"annotations": []}, ["not one box"]),
    ],
)
def test_a_bad_coco_file_is_explained(coco: Path, changes: dict[str, Any], words: list[str]) -> None:
    edit(coco, **changes)
    with pytest.raises(DataError) as caught:
        read_data(coco)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_json_that_is_not_coco_is_explained(coco: Path) -> None:
    coco.write_text("[]")
    with pytest.raises(DataError, match=r"images.*annotations.*categories.*missing"):
        read_data(coco)
    coco.write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        read_data(coco)


def test_one_missing_image_of_a_coco_file_is_named(coco: Path) -> None:
    images = [{"id": 5, "file_name": "one.png"}, {"id": 6, "file_name": "two.png"}]
    edit(coco, images=images)
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images are missing.*two\.png"):
        read_data(coco)
