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
    pytest.importorskip("ultralytics")  # labels are checked as it checks them
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
    assert read_data(yolo).images[0].labels.tolist() == [0, 1]


def test_an_image_without_label_file_is_background(yolo: Path) -> None:
    (yolo.parent / "labels" / "val" / "one.txt").unlink()
    assert [len(image.labels) for image in read_data(yolo).images] == [0, 1]


def test_labels_beside_the_images_where_no_folder_is_called_images(tmp_path: Path) -> None:
    pytest.importorskip("ultralytics")
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
    ("row", "word"),
    [
        ("0 0.5 0.5 0.5", "shape"),
        ("zero 0.5 0.5 0.5 0.5", "zero"),
        ("2 0.5 0.5 0.5 0.5", "class 2 exceeds"),
        ("0 1.4 0.5 0.2 0.2", "out of bounds"),
        ("0 0.5 0.5 -0.005 0.5", "negative"),
    ],
)
def test_an_image_with_a_bad_row_is_left_out_and_counted_as_in_a_training(
    yolo: Path, row: str, word: str, caplog: pytest.LogCaptureFixture
) -> None:
    (yolo.parent / "labels" / "val" / "one.txt").write_text(f"0 0.5 0.5 0.5 0.5\n{row}\n")
    data = read_data(yolo)
    assert [image.file.name for image in data.images] == ["two.png"]
    assert len(data.left_out) == 1
    assert "1 images or boxes left out" in caplog.text
    assert word in caplog.text and "one.png" in caplog.text


def test_where_all_images_are_bad_the_first_is_named(yolo: Path) -> None:
    for label in (yolo.parent / "labels" / "val").iterdir():
        label.write_text("0 20 10 20 10\n")
    with pytest.raises(DataError, match=r"none of its images can be used.*one\.png.*out of bounds"):
        read_data(yolo)


@pytest.mark.parametrize(
    "content",
    [
        "train: ../images/val\nval: ../images/val\nnames: [cat, dog]\nnc: 2",  # Roboflow's
        'path: .\nval: images/val\nnames: {"0": cat, "1": dog}',
        "path: FOLDER\nval: [images/val]\nnames:\n  0: cat\n  1: dog",
        "val: FOLDER/images\nnames: [cat, dog]",
        "val: list.txt\nnames: [cat, dog]",
        "val: images/val\nkpt_shape: [1, 2]\nnames: [cat, dog]",
    ],
    ids=["roboflow", "quoted", "list of folders", "folder above", "list with a missing file", "keypoints"],
)
def test_what_trains_is_read(yolo: Path, content: str) -> None:
    (yolo.parent / "list.txt").write_text(
        "./images/val/two.png\n./images/val/one.png\n./images/val/gone.png\n", "utf-8-sig"
    )
    if "kpt" in content:
        (yolo.parent / "labels" / "val" / "one.txt").write_text("0 0.5 0.5 0.5 0.5 0.4 0.4")
    yolo.write_text(content.replace("FOLDER", str(yolo.parent)))
    for data in (read_data(yolo), read_data(yolo.parent)):
        assert data.names == ("cat", "dog")
        assert [(image.file.name, image.labels.tolist()) for image in data.images] == [
            ("one.png", [0]),
            ("two.png", [1]),
        ]
        assert len(data.left_out) == ("list.txt" in content)


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ("[1, 2]", DataError, ["expected keys", "list"]),
        ("val: [", DataError, ["not valid YAML"]),
        ("val: images/val", DataError, ["'names'"]),
        ("val: images/val\nnames: {1: cat, 2: dog}", DataError, ["0 to n-1"]),
        ("val: images/val\nnames: {a: cat}", DataError, ["0 to n-1"]),
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
        read_data(yolo.parent / "images.txt")
    with pytest.raises(DataError, match="is a folder; expected one data yaml in it, found none"):
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


def test_an_unreadable_image_is_left_out(yolo: Path) -> None:
    (yolo.parent / "images" / "val" / "one.png").write_bytes(b"no picture")
    data = read_data(yolo)
    assert [image.file.name for image in data.images] == ["two.png"]
    assert "one.png" in data.note


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
        (
            {"categories": [{"id": 8, "name": "dog"}]},
            ["2 images or boxes", "category_id 9", "categories are 8"],
        ),
        ({"categories": [{"id": "dog", "name": "dog"}]}, ["category id 'dog'"]),
        ({"categories": [{"id": 9}]}, ["no COCO file", "'name'"]),
        (
            {"annotations": [{"id": 7, "image_id": 6, "category_id": 9, "bbox": [0, 0, 1, 1]}]},
            ["annotation 7", "image 6"],
        ),
        (
            {"images": [{"id": 5, "file_name": "one.png", "width": 80, "height": 40}]},
            ["none of its images", "40x20", "80x40"],
        ),
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


def test_what_is_odd_in_a_coco_file_but_usable_is_used(coco: Path) -> None:
    content = json.loads(coco.read_text())
    before = read_data(coco).images[0]
    for image in content["images"]:
        image |= {"id": "a 5", "width": 0, "height": None, "file_name": "odd/..\\one.png"}
    for box in content["annotations"]:
        box |= {"image_id": "a 5", "category_id": str(box["category_id"]), "area": None}
    content["annotations"][1] |= {"iscrowd": None}
    content["categories"] = [{"id": str(each["id"]), "name": each["name"]} for each in content["categories"]]
    coco.write_text(json.dumps(content), encoding="utf-8-sig")
    (image,) = read_data(coco).images
    assert (image.labels.tolist(), image.boxes.tolist()) == (before.labels.tolist(), before.boxes.tolist())
    assert image.areas.tolist() == [200, 16]
    assert image.crowd.tolist() == [False, False]


def test_what_cannot_be_used_of_a_coco_file_is_left_out_and_counted(coco: Path) -> None:
    content = json.loads(coco.read_text())
    good = content["annotations"][0]
    bad: list[dict[str, Any]] = [{"image_id": 6}, {"category_id": 1}, {"bbox": None}, {"bbox": []}, {"bbox": {"x": 1}}]
    bad += [{"bbox": [1, 1, 0, 5]}, {"bbox": [1, 1, float("nan"), 5]}, {"bbox": [1, 1, "2", 5]}]
    content["annotations"] = [{**good, **each} for each in bad] + [good]
    (coco.parent.parent / "images" / "torn.png").write_bytes(b"no picture")
    content["images"] += [{"id": 6 + n, "file_name": name} for n, name in enumerate(("gone.png", "torn.png"), 1)]
    del content["annotations"][1]["bbox"]
    coco.write_text(json.dumps(content))
    data = read_data(coco)
    assert [len(image.boxes) for image in data.images] == [1]
    assert len(data.left_out) == len(bad) + 2
    assert "gone.png" in data.left_out[-2] and "torn.png" in data.left_out[-1]
