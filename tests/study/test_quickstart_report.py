"""The quickstart's table, report and picture, from made-up results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fgd_hooks.study.quickstart_report import QuickstartResult, comparison_table, draw, markdown, write_report


def training(value: float, seed: int = 0, batches: int = 7, star: float | None = 0.5) -> dict[str, Any]:
    """What a training leaves behind, with a given mAP50-95."""
    return {
        "seed": seed,
        "student": "small",
        "epochs": 12,
        "settings": {"imgsz": 160, "batch": 8, "lr0": 0.003},
        "results": {
            "val": {
                "map50_95": value,
                "map50": value + 0.2,
                "images": 33,
                "per_class": [{"name": "disc", "map50_95": value}, {"name": "star", "map50_95": star}],
            }
        },
        "parameters": 890_000,
        "gflops": 0.25,
        "wall_s": 90.0,
        "cpu_s": 80.0,
        "curve": [[4, value / 2], [8, value * 0.8], [12, value]],
        "batches": batches,
        "inherited": "",
    }


def comparison(alone: list[float], fgd: list[float]) -> QuickstartResult:
    return QuickstartResult.from_results(
        {**training(0.61), "parameters": 3_000_000},
        [training(value, seed) for seed, value in enumerate(alone)],
        [training(value, seed) for seed, value in enumerate(fgd)],
    )


def test_table_has_a_row_for_each_model() -> None:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(comparison_table(comparison([0.44], [0.475])))
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in captured.get().splitlines()
        if line.count("│") > 3
    }
    assert rows == {
        "teacher": ["61.0", "81.0", "3.00 M", "0.25", "1.5"],
        "student alone": ["44.0", "64.0", "0.89 M", "0.25", "1.5"],
        "student + FGD": ["47.5", "67.5", "0.89 M", "0.25", "1.5"],
    }
    assert "+3.5 points" in captured.get()
    assert "33 images" in captured.get()


def test_several_seeds_give_mean_and_spread_and_each_gain() -> None:
    result = comparison([0.40, 0.42], [0.43, 0.47])
    assert result.gains == pytest.approx([3.0, 5.0])
    text = markdown(result)
    assert "| student alone | 41.0 ± 1.4 |" in text
    assert "**+4.0 (per seed +3.0, +5.0)** points of mAP50-95 (seeds: 0, 1)" in text


def test_a_loss_is_shown_as_one() -> None:
    assert "**-2.0** points" in markdown(comparison([0.44], [0.42]))


def test_markdown_names_the_setting_and_the_classes() -> None:
    text = markdown(comparison([0.44], [0.475]))
    for part in ("`small`, 12 epochs", "160 px, batch 8", "0.003", "| disc | 61.0 | 44.0 | 47.5 |", "curves.png"):
        assert part in text, part


def test_where_the_student_began_is_said() -> None:
    assert "thinned" not in markdown(comparison([0.44], [0.475]))
    fgd = {**training(0.475), "inherited": "inherit=auto: 9 of 9 parameters of the network were inherited."}
    text = markdown(QuickstartResult.from_results(training(0.61), [training(0.44)], [fgd]))
    assert "begin as thinned teachers (`inherit=auto: 9 of 9 parameters of the network were inherited`)" in text


def test_a_class_without_boxes_is_a_dash() -> None:
    result = QuickstartResult.from_results(
        training(0.6, star=None), [training(0.4, star=None)], [training(0.5, star=None)]
    )
    assert "| star | - | - | - |" in markdown(result)


def test_flops_that_could_not_be_counted_are_a_dash() -> None:
    result = QuickstartResult.from_results({**training(0.6), "gflops": 0.0}, [training(0.4)], [training(0.5)])
    assert "| teacher | 60.0 | 80.0 | 0.89 M | - | 1.5 |" in markdown(result)


def test_different_batches_are_reported() -> None:
    same = comparison([0.44], [0.475])
    assert same.same_batches and "WARNING" not in markdown(same)
    other = QuickstartResult.from_results(training(0.6), [training(0.44, batches=1)], [training(0.47, batches=2)])
    assert not other.same_batches and "WARNING" in markdown(other)


def test_seeds_must_go_together() -> None:
    with pytest.raises(ValueError, match=r"seeds \[0\].*\[1\]"):
        QuickstartResult.from_results(training(0.6), [training(0.4, seed=0)], [training(0.5, seed=1)])


def test_files_are_written(tmp_path: Path) -> None:
    result = comparison([0.44], [0.475])
    report = write_report(tmp_path / "new", result)
    assert report.read_text(encoding="utf-8") == markdown(result)
    content = json.loads((tmp_path / "new" / "results.json").read_text())
    assert content["gains"] == pytest.approx([3.5])
    assert content["alone"][0]["map50_95"] == 0.44
    assert (tmp_path / "new" / "curves.png").is_file()


@pytest.mark.parametrize("seeds", [1, 3])
def test_picture_shows_both_curves_in_their_colours(tmp_path: Path, seeds: int) -> None:
    draw(
        comparison([0.40 + 0.01 * i for i in range(seeds)], [0.45 + 0.01 * i for i in range(seeds)]), tmp_path / "c.png"
    )
    with Image.open(tmp_path / "c.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        assert (np.abs(pixels - colour).max(1) < 8).sum() > 300
