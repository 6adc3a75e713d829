"""COCO metrics against figures worked out by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from fgd_hooks.errors import DataError
from fgd_hooks.evaluation.coco_metrics import coco_metrics
from fgd_hooks.evaluation.dataset import EvalData, Floats, true_image


def make_truth(*images: list[tuple[int, float, float, float, float]], crowd: bool = False) -> EvalData:
    """Two classes; one list of (label, left, top, width, height) per image of 200 x 200 pixels."""
    made = []
    for index, rows in enumerate(images):
        boxes = np.array([row[1:] for row in rows], dtype=np.float64).reshape(-1, 4)
        flags = np.full(len(rows), crowd)
        made.append(true_image(Path(f"{index}.png"), 200, 200, [row[0] for row in rows], boxes, crowd=flags))
    return EvalData(Path("data.yaml"), ("a", "b"), (0, 1), tuple(made), by_name=False)


def detections(*rows: tuple[float, ...]) -> Floats:
    return np.array(rows, dtype=np.float64).reshape(-1, 6)


def test_perfect_detections_score_one_in_every_class_and_size() -> None:
    truth = make_truth([(0, 10, 10, 20, 20), (1, 50, 50, 60, 60)], [(1, 5, 5, 120, 120)])
    result = coco_metrics(
        truth, [detections((10, 10, 20, 20, 0.9, 0), (50, 50, 60, 60, 0.8, 1)), detections((5, 5, 120, 120, 0.7, 1))]
    )
    assert (result.map50_95, result.map50, result.map75) == pytest.approx((1, 1, 1))
    assert (result.map_small, result.map_medium, result.map_large, result.ar) == pytest.approx((1, 1, 1, 1))
    assert [(c.name, c.images, c.boxes) for c in result.per_class] == [("a", 1, 1), ("b", 2, 2)]
    assert [c.map50_95 for c in result.per_class] == pytest.approx([1, 1])
    assert (result.images, result.boxes, result.detections) == (2, 3, 3)


def test_one_hit_of_two_boxes_gives_the_area_under_the_stepped_curve() -> None:
    # Hit at 0.9, false alarm at 0.8: precision 1 up to recall 0.5, nothing beyond. 51 of the 101 recalls are <= 0.5.
    truth = make_truth([(0, 10, 10, 40, 40), (0, 100, 100, 40, 40)])
    result = coco_metrics(truth, [detections((10, 10, 40, 40, 0.9, 0), (60, 10, 40, 40, 0.8, 0))])
    assert result.map50 == pytest.approx(51 / 101)
    assert result.ar == pytest.approx(0.5)


def test_a_box_of_iou_two_thirds_counts_up_to_that_threshold() -> None:
    # 40 x 40 against 40 x 60 at the same corner: IoU 2/3, a hit at 0.50, 0.55, 0.60 and 0.65.
    truth = make_truth([(0, 10, 10, 40, 60)])
    result = coco_metrics(truth, [detections((10, 10, 40, 40, 0.9, 0))])
    assert (result.map50, result.map75, result.map50_95) == pytest.approx((1.0, 0.0, 0.4))


def test_a_detection_of_the_wrong_class_does_not_count() -> None:
    truth = make_truth([(0, 10, 10, 40, 40), (1, 100, 100, 40, 40)])
    result = coco_metrics(truth, [detections((10, 10, 40, 40, 0.9, 1), (100, 100, 40, 40, 0.95, 1))])
    assert [c.map50 for c in result.per_class] == pytest.approx([0, 1])
    assert result.map50 == pytest.approx(0.5)


def test_nothing_detected_is_zero_and_a_class_without_boxes_is_none() -> None:
    result = coco_metrics(make_truth([(0, 10, 10, 40, 40)]), [detections()])
    assert result.map50_95 == 0.0
    assert result.per_class[1].map50_95 is None
    assert result.map_large is None


def test_crowd_regions_neither_count_as_boxes_nor_punish_detections() -> None:
    crowded = make_truth([(0, 10, 10, 80, 80)], crowd=True)
    plain = make_truth([(0, 150, 150, 40, 40)])
    both = EvalData(crowded.source, crowded.names, crowded.ids, crowded.images + plain.images, by_name=False)
    result = coco_metrics(both, [detections((20, 20, 30, 30, 0.95, 0)), detections((150, 150, 40, 40, 0.9, 0))])
    assert result.boxes == 1
    assert result.map50 == pytest.approx(1.0)


def test_max_dets_keeps_the_most_confident_detections_of_a_class() -> None:
    wrong = [(100.0, 100.0, 20.0, 20.0, 0.9, 0.0)] * 10
    truth = make_truth([(0, 10, 10, 40, 40)])
    found = [detections(*wrong, (10, 10, 40, 40, 0.5, 0))]
    assert coco_metrics(truth, found, max_dets=10).map50 == 0.0
    assert coco_metrics(truth, found, max_dets=11).map50 == pytest.approx(1 / 11)


def test_silent_and_plain_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    result = coco_metrics(make_truth([(0, 10, 10, 40, 40)]), [detections((10, 10, 40, 40, 0.9, 0))])
    assert capsys.readouterr().out == ""
    again = json.loads(json.dumps(result.to_dict()))
    assert again["map50_95"] == pytest.approx(1.0)
    assert again["per_class"][1] == {
        "name": "b", "images": 0, "boxes": 0, "map50_95": None, "map50": None, "map75": None,
    }  # fmt: skip


def test_tables_show_every_class_in_per_cent_and_a_dash_for_none() -> None:
    from rich.console import Console

    result = coco_metrics(make_truth([(0, 10, 10, 40, 60)]), [detections((10, 10, 40, 40, 0.9, 0))])
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(result.table("title"), result.size_table())
    text = console.export_text()
    rows = {line.split("│")[1].strip(): line.split("│")[2:] for line in text.splitlines() if line.count("│") > 3}
    assert [cell.strip() for cell in rows["a"]][:5] == ["1", "1", "40.0", "100.0", "0.0"]
    assert [cell.strip() for cell in rows["b"]][:5] == ["0", "0", "-", "-", "-"]


def test_errors_say_what_is_wrong() -> None:
    truth = make_truth([(0, 10, 10, 40, 40)])
    with pytest.raises(ValueError, match="2 arrays of detections for 1 images"):
        coco_metrics(truth, [detections(), detections()])
    with pytest.raises(DataError, match="max_dets is 5; expected at least 10"):
        coco_metrics(truth, [detections()], max_dets=5)
