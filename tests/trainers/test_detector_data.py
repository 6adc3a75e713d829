"""Images, boxes and labels as a detector sees them, and COCO metrics of what it says."""

import json
import shutil

import pytest
import torch
from torch import nn

from fgd_hooks.errors import DataError
from tests.trainers.conftest import IDS, data_settings


@pytest.fixture
def splits(coco):
    from detector_data import read_splits
    from detector_settings import DataSettings

    return read_splits(DataSettings(**data_settings(coco)))


def test_boxes_and_labels(splits):
    from detector_data import Detections

    image, target = Detections(splits["train"])[1]
    assert image.shape == (3, 72, 64)
    assert target["boxes"].tolist() == [[7, 4, 31, 28], [7, 32, 31, 56]]
    assert target["labels"].tolist() == [1, 2], "category ids 3 and 7 in their order"
    for (x1, y1, x2, y2), colour in zip(target["boxes"].long().tolist(), IDS.values(), strict=True):
        inside = image[:, y1:y2, x1:x2].flatten(1).mean(1)
        assert (inside * 255).round().tolist() == list(colour)


@pytest.mark.parametrize(("across", "down"), [(1, 0), (0, 1), (1, 1)])
def test_boxes_stay_on_their_objects_when_an_image_is_flipped(splits, across, down):
    from detector_data import Detections
    from detector_settings import ImageSettings

    plain, _ = Detections(splits["train"])[0]
    image, target = Detections(splits["train"], ImageSettings(flip=across, flip_vertical=down))[0]
    assert not torch.equal(plain, image)
    for (x1, y1, x2, y2), colour in zip(target["boxes"].long().tolist(), IDS.values(), strict=True):
        assert (image[:, y1:y2, x1:x2].flatten(1).mean(1) * 255).round().tolist() == list(colour)


def test_crowds_and_boxes_without_area_are_not_trained_on(coco, tmp_path):
    from detector_data import Detections, read_splits
    from detector_settings import DataSettings

    shutil.copytree(coco, tmp_path / "data")
    file = tmp_path / "data" / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["iscrowd"] = 1
    content["annotations"][3]["bbox"][2] = 0
    file.write_text(json.dumps(content))
    data = Detections(read_splits(DataSettings(**data_settings(tmp_path / "data")))["train"])
    assert [data[number][1]["labels"].tolist() for number in range(3)] == [[2], [1], [1, 2]]


def test_splits_of_other_classes_are_refused(coco, tmp_path):
    from detector_data import read_splits
    from detector_settings import DataSettings

    shutil.copytree(coco, tmp_path / "data")
    file = tmp_path / "data" / "annotations" / "instances_val.json"
    file.write_text(file.read_text().replace("class7", "class8"))
    with pytest.raises(DataError, match=r"instances_val\.json.*class8.*class7"):
        read_splits(DataSettings(**data_settings(tmp_path / "data")))


class Oracle(nn.Module):
    """Says what is there, looked up by the image's size; or nothing."""

    def __init__(self, data, knows=True):
        super().__init__()
        self.answers = {tuple(image.shape): target for image, target in data}
        self.knows = knows

    def forward(self, images):
        assert not self.training
        found = [self.answers[tuple(image.shape)] for image in images]
        kept = slice(None) if self.knows else slice(0)
        return [
            {"boxes": t["boxes"][kept], "labels": t["labels"][kept], "scores": torch.ones(len(t["labels"]))[kept]}
            for t in found
        ]


@pytest.mark.parametrize("batch", [1, 3])
def test_metrics_of_one_who_knows_and_of_one_who_does_not(splits, batch):
    from detector_data import Detections, evaluate

    model = Oracle(Detections(splits["val"])).train()
    metrics = evaluate(model, splits["val"], torch.device("cpu"), batch)
    assert (metrics.map50_95, metrics.map50, metrics.images) == (pytest.approx(1), pytest.approx(1), 2)
    assert [entry.name for entry in metrics.per_class] == ["class3", "class7"]
    assert model.training
    model.knows = False
    assert evaluate(model, splits["val"], torch.device("cpu"), batch).map50_95 == 0
