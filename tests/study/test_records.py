"""Records of runs in one file for all: the same bytes for the same content, and what is damaged is said."""

import gzip
import os

import pytest

from fgd_hooks.errors import StudyError
from fgd_hooks.study import records
from fgd_hooks.study.records import CURVES, RUNS, read_curves, read_runs, write_records

RUN = {"name": "b", "map50_95": 0.1 + 0.2, "text": "a, b\n"}
CURVE = {"a": [{"epoch": "1", "loss": "0.50"}], "b": [{"epoch": "1", "fgd": "1e-05"}, {"epoch": "2", "fgd": "nan"}]}


def test_what_is_written_is_read(tmp_path):
    write_records(tmp_path, {"b": RUN, "a": {"name": "a"}}, CURVE)
    assert read_runs(tmp_path) == {"a": {"name": "a"}, "b": RUN}
    assert list(read_runs(tmp_path)) == ["a", "b"], "by name, whatever order they came in"
    assert read_curves(tmp_path) == CURVE
    text = gzip.decompress((tmp_path / CURVES).read_bytes()).decode()
    assert text == "run,epoch,loss,fgd\na,1,0.50,\nb,1,,1e-05\nb,2,,nan\n"


def test_nothing_is_read_from_nothing(tmp_path):
    assert (read_runs(tmp_path), read_curves(tmp_path), records.read_study(tmp_path)) == ({}, {}, {})


def test_the_same_content_has_the_same_bytes(tmp_path, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    write_records(one, {"b": RUN, "a": {"name": "a"}}, CURVE)
    monkeypatch.setattr("time.time", lambda: 1e9)
    write_records(other, {"a": {"name": "a"}, "b": RUN}, dict(reversed(CURVE.items())))
    assert [(one / name).read_bytes() for name in (RUNS, CURVES)] == [
        (other / name).read_bytes() for name in (RUNS, CURVES)
    ]


def test_curves_packed_by_another_zlib_are_left_as_they_are(tmp_path):
    write_records(tmp_path, {"a": {"name": "a"}}, CURVE)
    loose = gzip.compress(gzip.decompress((tmp_path / CURVES).read_bytes()), 1)
    (tmp_path / CURVES).write_bytes(loose)
    write_records(tmp_path, {"a": {"name": "a"}}, CURVE)
    assert (tmp_path / CURVES).read_bytes() == loose


def test_a_write_that_breaks_off_leaves_the_old_records(tmp_path, monkeypatch):
    write_records(tmp_path, {"a": {"name": "a"}}, {})

    def full(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_records(tmp_path, {"b": RUN}, CURVE)
    assert list(read_runs(tmp_path)) == ["a"]


def test_a_damaged_line_is_named(tmp_path):
    write_records(tmp_path, {"a": {"name": "a"}}, {})
    with (tmp_path / RUNS).open("a") as stream:
        stream.write('{"name": "b"')
    with pytest.raises(StudyError, match=r"runs\.jsonl:2 is no collected run"):
        read_runs(tmp_path)
