"""`evaluate` on a detector that finds boxes by their colour, so that every figure is known beforehand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("ultralytics")
pytest.importorskip("pycocotools")

from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER

from fgd_hooks.errors import DataError
from fgd_hooks.evaluation.evaluate import evaluate
from fgd_hooks.evaluation.readers import quiet_ultralytics
from fgd_hooks.study.quickstart import STUDENT

NAMES = {0: "red", 1: "green", 2: "blue"}
BOXES = [  # per image: size, then class, left, top, width, height in pixels
    ((96, 64), [(0, 8, 8, 40, 24), (1, 56, 32, 32, 28)]),
    ((48, 80), [(2, 4, 40, 30, 36)]),
    ((64, 64), [(1, 10, 10, 20, 20), (2, 34, 36, 28, 24)]),
]


class ColourDetector(DetectionModel):
    """Finds one box for each colour of an image and makes it wider by a factor; the letterbox's grey is no colour."""

    wider = 1.0

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        found = torch.zeros(len(x), 7, 8)  # images, box and three scores, candidates
        for index, image in enumerate(x):
            for label in range(3):
                others = [c for c in range(3) if c != label]
                rows, columns = torch.where((image[label] > 0.6) & (image[others].amax(0) < 0.4))
                if len(rows):
                    x1, x2, y1, y2 = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
                    width = (x2 - x1) * self.wider
                    found[index, :4, label] = torch.stack([x1 + width / 2, (y1 + y2) / 2, width, y2 - y1])
                    found[index, 4 + label, label] = 0.9
        return found


def make_detector(wider: float = 1.0) -> Any:
    with quiet_ultralytics():
        yolo = YOLO(str(STUDENT), task="detect")
        yolo.model = DetectionModel(str(STUDENT), nc=3, verbose=False)
    yolo.model.__class__ = ColourDetector  # after the construction, which runs the real forward pass
    yolo.model.names = dict(NAMES)
    yolo.model.wider = wider
    return yolo


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The images of BOXES in YOLO format, and as COCO json with ids and order of its own."""
    root = tmp_path / "colours"
    for folder in ("images/val", "labels/val", "annotations"):
        (root / folder).mkdir(parents=True)
    coco: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 3, "name": "blue"}, {"id": 7, "name": "red"}, {"id": 20, "name": "green"}],
    }
    category = {0: 7, 1: 20, 2: 3}
    for index, ((width, height), boxes) in enumerate(BOXES):
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        rows = []
        for label, x, y, w, h in boxes:
            pixels[y : y + h, x : x + w, label] = 255
            rows.append(f"{label} {(x + w / 2) / width} {(y + h / 2) / height} {w / width} {h / height}")
            coco["annotations"].append(
                {
                    "id": len(coco["annotations"]),
                    "image_id": index + 50,
                    "category_id": category[label],
                    "bbox": [x, y, w, h],
                }
            )
        Image.fromarray(pixels).save(root / "images" / "val" / f"{index}.png")
        (root / "labels" / "val" / f"{index}.txt").write_text("\n".join(rows))
        coco["images"].insert(0, {"id": index + 50, "file_name": f"{index}.png", "width": width, "height": height})
    (root / "annotations" / "instances_val.json").write_text(json.dumps(coco))
    (root / "data.yaml").write_text("train: images/val\nval: images/val\nnames: [red, green, blue]\n")
    return root


def test_perfect_detector_is_perfect_in_both_formats_and_in_both_measures(data: Path) -> None:
    yolo = make_detector()
    for file in (data / "data.yaml", data / "annotations" / "instances_val.json"):
        result = evaluate(yolo, file, imgsz=96, batch=2, device="cpu")
        assert result.map50 == pytest.approx(1.0)
        assert {entry.name: (entry.images, entry.boxes) for entry in result.per_class} == {
            "red": (1, 1), "green": (2, 2), "blue": (2, 2),
        }  # fmt: skip
        assert all(entry.map50 == pytest.approx(1.0) for entry in result.per_class)
        assert result.ultralytics_map50 == pytest.approx(0.995)  # its interpolation ends just below 1
        assert (result.images, result.boxes, result.detections, result.imgsz) == (3, 5, 5, 96)


@pytest.mark.parametrize(("limit", "boxes"), [(1, 2), (2, 3), (3, 5), (9, 5), (None, 5)])
def test_a_limit_takes_evenly_spread_images(data: Path, limit: int | None, boxes: int) -> None:
    """Of the three images (2, 1 and 2 boxes) the first; the first and the second; all."""
    result = evaluate(make_detector(), data / "data.yaml", imgsz=96, batch=2, device="cpu", limit=limit)
    assert (result.images, result.boxes) == (min(limit or 3, 3), boxes)
    assert result.map50 == pytest.approx(1.0)


def test_a_limit_that_leaves_nothing_is_explained(data: Path) -> None:
    with pytest.raises(DataError, match="limit is 0; expected a number of images, 1 or more"):
        evaluate(make_detector(), data / "data.yaml", imgsz=96, device="cpu", limit=0)
    (data / "labels" / "val" / "0.txt").write_text("")
    with pytest.raises(DataError, match="1 of 3 images, evenly spread, have no box; raise the limit"):
        evaluate(make_detector(), data / "data.yaml", imgsz=96, device="cpu", limit=1)


def test_agrees_with_model_val(data: Path, tmp_path: Path) -> None:
    # 1.4 times too wide: IoU 0.71, a hit at five of ten thresholds, unless the image's border cuts the box.
    yolo = make_detector(wider=1.4)
    result = evaluate(yolo, data / "data.yaml", imgsz=96, batch=2, device="cpu")
    with quiet_ultralytics():
        own = yolo.val(
            data=str(data / "data.yaml"),
            imgsz=96,
            batch=2,
            device="cpu",
            plots=False,
            project=str(tmp_path),
            name="val",
        )
    assert result.ultralytics_map50_95 == pytest.approx(float(own.box.map), abs=1e-6)
    assert result.ultralytics_map50 == pytest.approx(float(own.box.map50), abs=1e-6)
    assert 0.4 < float(own.box.map) < 0.6
    assert result.per_class[0].map50_95 == pytest.approx(0.5)  # the red box lies inside
    assert result.map50_95 is not None and result.map50_95 >= own.box.map


def test_nothing_is_printed_or_left_behind(data: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(data)
    before = sorted(data.rglob("*"))
    level = LOGGER.level
    evaluate(make_detector(), data / "data.yaml", imgsz=96, device="cpu")
    assert capfd.readouterr().out == ""
    assert sorted(data.rglob("*")) == before
    assert LOGGER.level == level


def test_the_model_is_not_changed(data: Path) -> None:
    yolo = make_detector()
    before = {name: value.clone() for name, value in yolo.model.state_dict().items()}
    evaluate(yolo, data / "data.yaml", imgsz=96, device="cpu")
    after = yolo.model.state_dict()
    assert before.keys() == after.keys()  # fusing would remove the batch norms
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_result_is_json_and_prints_as_tables(data: Path) -> None:
    from rich.console import Console

    result = evaluate(make_detector(), data / "data.yaml", imgsz=96, device="cpu")
    content = json.loads(json.dumps(result.to_dict()))
    assert content["split"] == "val" and content["nms"] is None and content["per_class"][0]["name"] == "red"
    console = Console(width=160)
    with console.capture() as captured:
        console.print(result)
    for text in ("mAP50-95", "green", "100.0", "small", "Ultralytics"):
        assert text in captured.get()


def test_classes_that_do_not_go_together_are_explained(data: Path) -> None:
    yolo = make_detector()
    file = data / "data.yaml"
    file.write_text("val: images/val\nnames: [red, green, blue, grey]\n")
    with pytest.raises(DataError, match=r"has 4 classes.*the model has 3"):
        evaluate(yolo, file, imgsz=96, device="cpu")
    file.write_text("val: images/val\nnames: [rot, green, blue]\n")
    with pytest.raises(DataError, match=r"not know by that name \(rot\).*match='order'"):
        evaluate(yolo, file, imgsz=96, device="cpu")
    assert evaluate(yolo, file, imgsz=96, device="cpu", match="order").map50 == pytest.approx(1.0)
    file.write_text("val: images/val\nnames: [green, red, blue]\n")
    with pytest.raises(DataError, match=r"0: green, 1: red.*0: red, 1: green"):
        evaluate(yolo, file, imgsz=96, device="cpu")


def test_a_category_without_boxes_that_the_model_does_not_know_is_no_class(data: Path) -> None:
    file = data / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    content["categories"].insert(0, {"id": 5, "name": "colours", "supercategory": "none"})
    file.write_text(json.dumps(content))
    for match in ("name", "order"):
        result = evaluate(make_detector(), file, imgsz=96, device="cpu", match=match)  # type: ignore[arg-type]
        assert [entry.name for entry in result.per_class] == ["blue", "red", "green"]
        assert result.map50 == pytest.approx(1.0 if match == "name" else 0.0)
    content["annotations"][0]["category_id"] = 5
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="has 4 classes"):
        evaluate(make_detector(), file, imgsz=96, device="cpu")


def test_what_is_left_out_is_counted(data: Path) -> None:
    (data / "images" / "val" / "torn.png").write_bytes(b"no picture")
    result = evaluate(make_detector(), data / "data.yaml", imgsz=96, device="cpu")
    assert (result.images, result.left_out, result.map50) == (3, 1, pytest.approx(1.0))


def test_match_by_order_takes_categories_by_ascending_id(data: Path) -> None:
    # blue 3, red 7, green 20 against red, green, blue: every class is taken for another, so nothing is right.
    result = evaluate(
        make_detector(), data / "annotations" / "instances_val.json", imgsz=96, device="cpu", match="order"
    )
    assert result.map50 == 0.0


def test_wrong_models_are_explained(data: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt not found"):
        evaluate(tmp_path / "nothing.pt", data / "data.yaml")
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"no weights")
    with pytest.raises(DataError, match=r"broken\.pt cannot be loaded"):
        evaluate(broken, data / "data.yaml")
    with pytest.raises(DataError, match=r"quickstart\.yaml describes a model without weights"):
        evaluate(STUDENT, data / "data.yaml")
    with pytest.raises(DataError, match="got Linear"):
        evaluate(torch.nn.Linear(1, 1), data / "data.yaml")
    with pytest.raises(DataError, match="task is 'classify'"), quiet_ultralytics():
        evaluate(YOLO("yolov8n-cls.yaml"), data / "data.yaml")
    with pytest.raises(FileNotFoundError, match="data file"):
        evaluate(make_detector(), tmp_path / "data.yaml")


def test_both_heads_of_an_end_to_end_model_can_be_measured(data: Path) -> None:
    # Untrained weights: the figures mean nothing, but the two heads detect different things.
    torch.manual_seed(0)
    with quiet_ultralytics():
        yolo = YOLO("yolo26n.yaml", task="detect")
        yolo.model = DetectionModel("yolo26n.yaml", nc=3, verbose=False)
    yolo.model.names = dict(NAMES)
    many = evaluate(yolo, data / "data.yaml", imgsz=32, device="cpu", conf=0.0, nms=True)
    one = evaluate(yolo, data / "data.yaml", imgsz=32, device="cpu", conf=0.0, nms=False)
    default = evaluate(yolo, data / "data.yaml", imgsz=32, device="cpu", conf=0.0)
    assert default.detections == many.detections != one.detections
    assert (default.nms, one.nms) == (None, False)


@pytest.mark.slow
def test_agreement_on_blood_cells(tmp_path: Path) -> None:
    """Needs the folder of the BCCD data (with data_nopath.yaml and annotations/) and a model trained on them."""
    folder, weights = os.environ.get("FGD_BCCD_DIR"), os.environ.get("FGD_BCCD_MODEL")
    if not folder or not weights:
        pytest.skip("FGD_BCCD_DIR (data) and FGD_BCCD_MODEL (weights) are not both set")
    for split in ("val", "test"):
        for nms in (None, False):
            results = [
                evaluate(weights, file, split=split, imgsz=192, device="cpu", nms=nms)
                for file in (
                    Path(folder) / "data_nopath.yaml",
                    Path(folder) / "annotations" / f"instances_{split}.json",
                )
            ]
            for result in results:
                assert result.map50_95 == pytest.approx(result.ultralytics_map50_95, abs=0.006)
                assert result.map50 == pytest.approx(result.ultralytics_map50, abs=0.003)
            assert results[0].map50_95 == pytest.approx(results[1].map50_95, abs=1e-3)
            with quiet_ultralytics():
                own = YOLO(weights).val(
                    data=str(Path(folder) / "data_nopath.yaml"), split=split, imgsz=192, device="cpu", plots=False,
                    project=str(tmp_path), name=f"{split}{nms}", **({} if nms is None else {"nms": nms}),
                )  # fmt: skip
            assert results[0].ultralytics_map50_95 == pytest.approx(float(own.box.map), abs=1e-3)
