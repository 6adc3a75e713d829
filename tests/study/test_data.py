"""What the runs see: nested subsets, a holdout that becomes val, and nothing written where the data lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from PIL import Image

from fgd_hooks.errors import StudyError
from fgd_hooks.evaluation.readers import read_data
from fgd_hooks.study.data import Source, _content, prepare, read_source, scan_labels, subset
from fgd_hooks.study.spec import DataSpec
from tests.helpers.studies import make_data

IMAGES = [Path(f"/somewhere/{number:03d}.jpg") for number in range(200)]


def test_subsets_are_nested_and_of_the_right_size():
    tenth, quarter = subset(IMAGES, 0.1, 0), subset(IMAGES, 0.25, 0)
    assert (len(tenth), len(quarter)) == (20, 50)
    assert set(tenth) < set(quarter) < set(IMAGES)
    assert list(quarter) == sorted(quarter)
    assert subset(IMAGES, 1.0, 0) == tuple(IMAGES)


def test_subsets_follow_from_names_and_seed_alone():
    assert subset(IMAGES[::-1], 0.1, 0) == subset(IMAGES, 0.1, 0)[::-1]
    elsewhere = [Path("/else") / image.name for image in IMAGES]
    assert [i.name for i in subset(elsewhere, 0.1, 0)] == [i.name for i in subset(IMAGES, 0.1, 0)]
    assert subset(IMAGES, 0.1, 1) != subset(IMAGES, 0.1, 0)
    assert subset(IMAGES, 0.1, 0, "holdout") != subset(IMAGES, 0.1, 0)
    assert len(subset(IMAGES, 0.001, 0)) == 1


def test_a_holdout_becomes_val_and_val_becomes_test(tmp_path):
    make_data(tmp_path / "set", splits=("train", "val"))
    spec = DataSpec(yaml="set/data.yaml", holdout=0.2)
    found = read_source("a", spec, None, tmp_path, tmp_path / "out").splits
    assert {split: len(images) for split, images in found.items()} == {"train": 8, "val": 2, "test": 3}
    assert not set(found["train"]) & set(found["val"])
    assert {image.name for image in found["train"] + found["val"]} == {f"train{n}.png" for n in range(10)}
    assert {image.name for image in found["test"]} == {"val0.png", "val1.png", "val2.png"}


def test_a_holdout_of_a_set_with_a_test_split_is_refused(tmp_path):
    make_data(tmp_path / "set")
    with pytest.raises(StudyError, match="has a test split already"):
        read_source("a", DataSpec(yaml="set/data.yaml", holdout=0.2), None, tmp_path, tmp_path / "out")


def test_the_layout_holds_the_same_images_and_boxes(tmp_path):
    file = make_data(tmp_path / "set")
    before = sorted((tmp_path / "set").rglob("*"))
    source = read_source("a", DataSpec(yaml="set/data.yaml"), None, tmp_path, tmp_path / "out")
    found = prepare("a", source, tmp_path / "out")
    for split in ("train", "val", "test"):
        ours, theirs = read_data(found.yaml, split), read_data(file, split)
        assert [i.file.name for i in ours.images] == [i.file.name for i in theirs.images]
        assert all((a.boxes == b.boxes).all() for a, b in zip(ours.images, theirs.images, strict=True))
    assert found.counts == {"train": 10, "val": 3, "test": 3}
    assert sorted((tmp_path / "set").rglob("*")) == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == [found.yaml.parent.name]


def test_a_fraction_is_a_list_of_its_own(tmp_path):
    make_data(tmp_path / "set")
    source = read_source("a", DataSpec(yaml="set/data.yaml"), None, tmp_path, tmp_path / "out")
    whole, half = prepare("a", source, tmp_path / "out"), prepare("a", source, tmp_path / "out", 0.5)
    assert half.key != whole.key
    assert half.counts == {"train": 5, "val": 3, "test": 3}
    lines = (half.yaml.parent / yaml.safe_load(half.yaml.read_text())["train"]).read_text().split()
    assert len(lines) == 5 and all((half.yaml.parent / line).is_file() for line in lines)
    assert prepare("a", source, tmp_path / "out", 0.5) == half


def test_changed_labels_are_other_data(tmp_path):
    make_data(tmp_path / "set")
    source = read_source("a", DataSpec(yaml="set/data.yaml"), None, tmp_path, tmp_path / "out")
    first = prepare("a", source, tmp_path / "out")
    (tmp_path / "set" / "labels" / "train" / "train0.txt").write_text("0 0.4 0.5 0.5 0.5\n")
    assert prepare("a", source, tmp_path / "out").key != first.key


def test_images_of_the_same_names_are_other_data(tmp_path):
    keys = set()
    for name, colour in (("one", 0), ("two", 255)):
        make_data(tmp_path / name)
        Image.new("RGB", (16, 16), (colour, colour, colour)).save(tmp_path / name / "images" / "val" / "val0.png")
        source = read_source("a", DataSpec(yaml=f"{name}/data.yaml"), None, tmp_path, tmp_path / "out")
        keys.add(prepare("a", source, tmp_path / "out").key)
    assert len(keys) == 2


def test_a_large_file_counts_at_its_beginning_middle_and_end(tmp_path):
    file, found = tmp_path / "a.bmp", set()
    for place in (None, 0, 50_000, 99_999):
        content = bytearray(100_000)
        if place is not None:
            content[place] = 1
        file.write_bytes(content)
        found.add(_content(file))
    assert len(found) == 4


def test_links_follow_a_set_that_was_moved(tmp_path):
    make_data(tmp_path / "set")
    spec = DataSpec(yaml="set/data.yaml")
    first = prepare("a", read_source("a", spec, None, tmp_path, tmp_path / "out"), tmp_path / "out")
    (tmp_path / "new").mkdir()
    (tmp_path / "set").rename(tmp_path / "new" / "set")
    moved = prepare("a", read_source("a", spec, tmp_path / "new", tmp_path, tmp_path / "out"), tmp_path / "out")
    assert moved == first
    images = list((first.yaml.parent / "images").glob("*/*.png"))
    assert len(images) == 16 and all(image.is_file() for image in images)


def test_a_holdout_that_leaves_nothing_to_train_on(tmp_path):
    make_data(tmp_path / "set", splits=("train", "val"))
    with pytest.raises(StudyError, match=r"data\.a\.holdout: 0\.99 of 10 images leaves none"):
        read_source("a", DataSpec(yaml="set/data.yaml", holdout=0.99), None, tmp_path, tmp_path / "out")


def test_images_in_two_splits_are_said(tmp_path, caplog):
    file = make_data(tmp_path / "set")
    read_source("a", DataSpec(yaml="set/data.yaml"), None, tmp_path, tmp_path / "out")
    assert caplog.text == ""
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "test": "images/val"}))
    read_source("a", DataSpec(yaml="set/data.yaml"), None, tmp_path, tmp_path / "out")
    assert "data.a: 3 images are in both val and test" in caplog.text


def test_two_images_of_one_name_are_refused(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / "images" / folder).mkdir(parents=True)
    for file in ("x/a.png", "y/a.jpg"):  # one label file would have to serve both
        (tmp_path / "images" / file).write_bytes(b"")
    twins = tuple(sorted((tmp_path / "images").glob("*/a.*")))
    with pytest.raises(StudyError, match="called a;"):
        prepare("a", Source(("c",), {"train": twins, "val": twins[:1]}), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_missing_set_names_the_data_root(tmp_path):
    with pytest.raises(StudyError, match=r"neither below the data root .* --data-root or FGD_DATA"):
        read_source("a", DataSpec(yaml="nowhere.yaml"), tmp_path, tmp_path, tmp_path)


def test_the_drawn_set_has_a_test_split_of_other_pictures(tmp_path):
    spec = DataSpec(scenes={"train": 2, "val": 2, "size": 64})
    found = read_source("a", spec, None, tmp_path, tmp_path).splits
    assert [len(found[split]) for split in ("train", "val", "test")] == [2, 2, 2]
    assert found["val"][0].read_bytes() != found["test"][0].read_bytes()
    with pytest.raises(StudyError, match=r"data\.a\.scenes"):
        read_source("a", DataSpec(scenes={"sise": 64}), None, tmp_path, tmp_path)


def test_a_test_split_without_labels_is_left_out_and_said(tmp_path, caplog):
    make_data(tmp_path / "set")
    for file in (tmp_path / "set/labels/test").iterdir():
        file.unlink()
    source = read_source("a", DataSpec(yaml="set/data.yaml"), None, tmp_path, tmp_path / "out")
    assert set(source.splits) == {"train", "val"}
    assert "The test split is left out" in caplog.text
    for file in (tmp_path / "set/labels/val").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match="'val'"):
        read_source("a", DataSpec(yaml="set/data.yaml"), None, tmp_path, tmp_path / "out")


def test_scanned_labels_are_not_scanned_again(tmp_path, monkeypatch):
    from ultralytics.data import YOLODataset
    from ultralytics.data.utils import check_det_dataset

    make_data(tmp_path / "set")
    source = read_source("a", DataSpec(yaml="set/data.yaml"), None, tmp_path, tmp_path / "out")
    prepared = prepare("a", source, tmp_path / "out")
    scan_labels(prepared)
    monkeypatch.setattr(YOLODataset, "cache_labels", lambda *_: pytest.fail("scanned again"))
    data = check_det_dataset(str(prepared.yaml))
    assert [len(YOLODataset(img_path=data[split], data=data)) for split in ("train", "val")] == [10, 3]
