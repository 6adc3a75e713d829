"""The pages of results/ follow from its records; the tables across studies by hand."""

from __future__ import annotations

import gzip

import pytest

from fgd_hooks.errors import StudyError
from fgd_hooks.study.records import CURVES, RUNS, read_curves, read_runs, write_records
from fgd_hooks.study.tables import markdown, read_comparisons
from results.overview import RESULTS, gains, main, page
from tests.study.test_tables import write

STUDIES = sorted(file.parent for file in RESULTS.glob("*/study.json"))


def test_the_tables_by_hand(tmp_path):
    for seed, (alone, longer, fgd) in enumerate([(0.40, 0.41, 0.45), (0.42, 0.40, 0.46), (0.44, 0.42, 0.47)]):
        write(tmp_path / "one", "alone", seed, alone)
        write(tmp_path / "one", "alone_same_compute", seed, longer)
        write(tmp_path / "one", "fgd", seed, fgd, cpu=15)
    write(tmp_path / "one", "teacher", 0, 0.48)
    write(tmp_path / "two", "alone", 0, 0.10, test=0.11)
    earlier = {"inherit": "channels", "balance": {"image_limit": None}}
    write(tmp_path / "two", "fgd", 0, 0.20, test=0.22, settings={}, fgd=earlier)
    write(tmp_path / "without", "alone", 0, 0.10)
    text = "\n".join(gains([tmp_path / name for name in ("one", "two", "without")]))
    assert "| d | n | val | 3 | 42.0 ± 2.0 | 46.0 ± 1.0 | 48.0 | 67 % | 1.50 | defaults |" in text
    # the differences are 5, 4, 3 and 4, 6, 5 points: standard deviation 1, so 4.302653 / sqrt(3) on either side
    assert "| d | n | val | +4.0 (+1.5 .. +6.5) | +5.0 (+2.5 .. +7.5) | - | - | - | - |" in text
    assert "| d | n | test | 1 | 11.0 | 22.0 | - | - | 1.00 | `balance.image_limit=null`, `inherit=channels` |" in text
    assert "| d | n | alone_same_compute | 5 | 5 | 1.50 |" in text  # fgd took 15 seconds, the arm 10
    assert text.count("| d | n |") == 7


def test_an_overview_of_nothing_is_an_error(tmp_path):
    write(tmp_path / "one", "alone", 0, 0.4)
    with pytest.raises(StudyError, match="has a run of the arm 'fgd'"):
        gains([tmp_path / "one"])


def test_the_overview_follows_from_the_records():
    assert page() == (RESULTS / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_the_tables_of_a_study_follow_from_its_records(folder):
    assert markdown(*read_comparisons(folder), folder.name) == (folder / "tables.md").read_text(encoding="utf-8")


def test_rebuilding_writes_nothing_where_nothing_changed(capsys):
    main()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("folder", [*STUDIES, RESULTS / "detectors"], ids=lambda folder: folder.name)
def test_records_are_written_as_they_lie_there(folder, tmp_path):
    runs, curves = read_runs(folder), read_curves(folder)
    assert set(curves) <= set(runs)
    assert all(curve[-1]["epoch"] == str(len(curve)) for curve in curves.values())
    write_records(tmp_path, runs, curves)
    assert (tmp_path / RUNS).read_bytes() == (folder / RUNS).read_bytes()
    assert gzip.decompress((tmp_path / CURVES).read_bytes()) == gzip.decompress((folder / CURVES).read_bytes())


def test_the_figures_that_the_bccd_page_states():
    text = (RESULTS / "bccd" / "tables.md").read_text(encoding="utf-8")
    sections = {part.splitlines()[0].removeprefix("bccd, "): part for part in text.split("\n## ")[1:]}
    lines = (RESULTS / "bccd" / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| yolo26")]
    assert len(rows) >= 12
    for student, arm, epochs, val, test, classes, seeds in rows:
        for split, stated in (("val", val), ("test", test)):
            mean = stated.split(" (")[0]
            assert f"| {arm} | {epochs} | {seeds} | {mean} |" in sections[f"{student}: {split}"], (student, arm, split)
        assert f"| {arm} | {classes.replace(' / ', ' | ')} |" in sections[f"{student}: test"]


def test_the_table_of_the_detectors_follows_from_their_records():
    from benchmarks.detectors import BEGIN, END, PAGE, table

    text = PAGE.read_text(encoding="utf-8")
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip("\n") == table()
