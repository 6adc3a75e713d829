"""The tables from collected records: by hand, and those of the repository's BCCD study."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fgd_hooks.errors import StudyError
from fgd_hooks.study.records import RUNS, STUDY, read_runs, write_records
from fgd_hooks.study.tables import markdown, read_comparisons, write_tables

RESULTS = Path(__file__).parents[2] / "results"


def write(folder: Path, arm: str, seed: int, value: float, *, cpu: float = 10.0, test: float | None = None, **more):
    results = {"val": {"map50_95": value, "per_class": [{"name": "a", "map50_95": value}]}}
    if test is not None:
        results["test"] = {"map50_95": test, "per_class": [{"name": "a", "map50_95": test}]}
    name = f"d-{arm}-s{seed}"
    run = {"name": name, "data": "d", "student": "n", "arm": arm, "epochs": 5, "seed": seed, "cpu_s": cpu}
    write_records(folder, {**read_runs(folder), name: {**run, "results": results, **more}}, {})


def only_group(folder: Path, **study):
    if study:
        (folder / STUDY).write_text(json.dumps(study))
    _, (group,) = read_comparisons(folder)
    return group, {arm.name: arm for arm in group.arms}


def test_gain_gap_and_cost_by_hand(tmp_path):
    for seed, (alone, fgd) in enumerate([(0.40, 0.41), (0.42, 0.44), (0.44, 0.50)]):
        write(tmp_path, "alone", seed, alone, cpu=10)
        write(tmp_path, "fgd", seed, fgd, cpu=20 + seed)
    write(tmp_path, "teacher", 0, 0.52)
    group, arms = only_group(tmp_path)
    gain = group.gain(arms["fgd"], "val")
    assert gain.mean == pytest.approx(3.0)  # of 1, 2 and 6 points
    assert gain.half == pytest.approx(4.302653 * math.sqrt(7 / 3), rel=1e-6)
    assert group.closed(arms["fgd"], "val") == pytest.approx(3.0 / 10.0)  # the teacher is 10 above the mean of 42
    assert group.cost(arms["fgd"]) == pytest.approx(2.1)
    write(tmp_path, "teacher", 0, 0.425)
    group, arms = only_group(tmp_path)
    assert group.closed(arms["fgd"], "val") is None, "half a point is no gap"
    write(tmp_path, "teacher", 0, 0.52)
    group, arms = only_group(tmp_path)
    assert group.gain(arms["alone"], "val") is None
    text = markdown({}, [group], "x")
    assert "| fgd | 5 | 0, 1, 2 | 45.0 ± 4.6 | +3.0 | -3.6 .. +9.6 | 30 % | 2.10 |" in text
    assert "| alone | 5 | 0, 1, 2 | 42.0 ± 2.0 |  |  |  | 1.00 |" in text
    assert "| teacher (n) | 5 |  | 52.0 |" in text


def test_the_library_s_default_is_compared_with_every_other_arm(tmp_path):
    for seed, (alone, builtin, fgd) in enumerate([(0.40, 0.41, 0.45), (0.42, 0.40, 0.46), (0.44, 0.42, 0.44)]):
        write(tmp_path, "alone", seed, alone)
        write(tmp_path, "fgd", seed, fgd)
        write(tmp_path, "builtin", seed, builtin)
    write(tmp_path, "half", 1, 0.40)
    group, _ = only_group(tmp_path, arms=["alone", "builtin", "half", "fgd"])
    lines = markdown({}, [group], "x").splitlines()
    start = lines.index("| `fgd` less | seeds | difference | 95 % interval |")
    half = 4.302653 * 2 / math.sqrt(3)  # 4, 6 and 2 points: mean 4, standard deviation 2
    assert lines[start + 2] == f"| builtin | 3 | +4.0 | {4 - half:+.1f} .. {4 + half:+.1f} |"
    assert lines[start + 3] == "| half | 1 | +6.0 | one seed |"
    assert not lines[start + 4 :]
    other = markdown({"subject": "half"}, [group], "x")
    assert "| builtin | 1 | +0.0 | one seed |" in other
    assert "| `fgd` less" not in other


def test_only_common_seeds_are_paired(tmp_path):
    write(tmp_path, "alone", 0, 0.40)
    write(tmp_path, "alone", 1, 0.90)
    write(tmp_path, "fgd", 0, 0.43)
    write(tmp_path, "fgd", 2, 0.10)
    group, arms = only_group(tmp_path)
    gain = group.gain(arms["fgd"], "val")
    assert (gain.mean, gain.half, gain.count) == (pytest.approx(3.0), None, 1)
    assert "+3.0 | one seed" in markdown({}, [group], "x")


def test_without_a_baseline_or_a_teacher_there_is_no_difference(tmp_path):
    write(tmp_path, "fgd", 0, 0.4)
    group, arms = only_group(tmp_path)
    assert (group.gain(arms["fgd"], "val"), group.closed(arms["fgd"], "val"), group.cost(arms["fgd"])) == (None,) * 3


def test_order_of_the_arms_and_another_baseline(tmp_path):
    for arm in ("a", "b", "c"):
        write(tmp_path, arm, 0, 0.3)
    group, arms = only_group(tmp_path, arms=["c", "a"], baseline="c")
    assert list(arms) == ["c", "a", "b"]
    assert group.baseline is arms["c"]


def test_test_is_shown_where_it_was_measured(tmp_path):
    write(tmp_path, "alone", 0, 0.3, test=0.2)
    write(tmp_path, "fgd", 0, 0.3)
    group, _ = only_group(tmp_path)
    assert group.splits == ["val", "test"]
    assert "| fgd |" not in markdown({}, [group], "x").split("## d, n: test")[1]


@pytest.mark.parametrize(("other", "said"), [(7, "All arms of equal epochs were fed"), (8, "Not fed the same")])
def test_batches_are_compared(tmp_path, other, said):
    write(tmp_path, "alone", 0, 0.3, batches=7)
    write(tmp_path, "fgd", 0, 0.3, batches=other)
    assert said in markdown({}, [only_group(tmp_path)[0]], "x")


def test_doubtful_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_comparisons(tmp_path / "nowhere")
    with pytest.raises(StudyError, match="no collected run"):
        read_comparisons(tmp_path)
    write(tmp_path, "fgd", 0, 0.3)
    good = (tmp_path / RUNS).read_text()
    for bad, said in (
        ('{"name": "x"}', "x is no collected run: there is no 'student'"),
        ('{"arm": "x"}', ":2 is no collected run: KeyError"),
        ("{", ":2 is no collected run: JSONDecodeError"),
        ("[]", ":2 is no collected run: TypeError"),
        (good, ":2: d-fgd-s0 is there twice"),
        (good.replace("d-fgd-s0", "again"), "equal seeds"),
    ):
        (tmp_path / RUNS).write_text(good + bad)
        with pytest.raises(StudyError, match=said):
            read_comparisons(tmp_path)


def test_runs_of_one_arm_with_other_settings_are_refused(tmp_path):
    write(tmp_path, "fgd", 0, 0.3, settings={"lr0": 0.1})
    write(tmp_path, "fgd", 1, 0.3, settings={"lr0": 0.2})
    with pytest.raises(StudyError, match="different epochs or settings"):
        read_comparisons(tmp_path)


def test_a_difference_says_on_how_many_seeds_it_rests(tmp_path):
    for seed, value in ((0, 0.40), (1, 0.42)):
        write(tmp_path, "alone", seed, value)
    for seed, value in ((0, 0.43), (1, 0.47), (2, 0.50)):
        write(tmp_path, "fgd", seed, value)
    group, _ = only_group(tmp_path)
    assert "| fgd | 5 | 0, 1, 2 | 46.7 ± 3.5 | +4.0 | -8.7 .. +16.7 (2 of 3 seeds) |" in markdown({}, [group], "x")


def test_arms_of_equal_compute_say_what_they_cost(tmp_path):
    for seed in (0, 1):
        write(tmp_path, "alone", seed, 0.4, cpu=10)
        write(tmp_path, "fgd", seed, 0.5, cpu=20)
        write(tmp_path, "same", seed, 0.4, cpu=16 + seed)
    group, _ = only_group(tmp_path)
    text = markdown({"compute": {"same": "fgd", "other": "fgd"}}, [group], "x")
    assert "CPU seconds of arms of equal compute: `same` 0.82 of `fgd`." in text
    assert "equal compute" not in markdown({}, [group], "x")


def test_seconds_beside_a_gpu_are_not_compared_with_those_without(tmp_path):
    write(tmp_path, "alone", 0, 0.4, cpu=10, device="cpu")
    write(tmp_path, "alone", 1, 0.4, cpu=10, device="gpu")
    write(tmp_path, "fgd", 0, 0.5, cpu=5, device="gpu")
    write(tmp_path, "fgd", 1, 0.5, cpu=20, device="gpu")
    group, arms = only_group(tmp_path)
    assert group.cost(arms["fgd"]) == 2.0


def test_batches_of_different_seeds_are_not_called_the_same(tmp_path):
    write(tmp_path, "alone", 0, 0.4, batches=1)
    write(tmp_path, "fgd", 1, 0.5, batches=99)
    group, _ = only_group(tmp_path)
    text = markdown({}, [group], "x")
    assert "were fed the same batches" not in text
    assert "Batches not compared, for want of a common seed: fgd." in text
    write(tmp_path, "alone", 1, 0.4, batches=99)
    group, _ = only_group(tmp_path)
    assert "All arms of equal epochs were fed the same batches" in markdown({}, [group], "x")


def test_a_study_of_the_repository_is_rebuilt(tmp_path):
    folder = tmp_path / "bccd"
    folder.mkdir()
    for name in (STUDY, RUNS):
        shutil.copy(RESULTS / "bccd" / name, folder)
    text = write_tables(folder)
    assert (folder / "tables.md").read_text(encoding="utf-8") == text
    assert (RESULTS / "bccd" / "tables.md").read_text(encoding="utf-8") == text
    picture = np.asarray(Image.open(folder / "bccd-yolo26-half-val.png").convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
