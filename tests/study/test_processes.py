"""Programs in processes of their own: their threads, their log, their end; JSON files in one piece."""

from __future__ import annotations

import sys
import time

import pytest

from fgd_hooks.study.processes import log_tail, read_json, start_child, stop_child, write_json


def test_threads_environment_and_log(tmp_path):
    program = "import os; print(os.getcwd(), os.environ['OMP_NUM_THREADS'], os.environ['MINE']); import fgd_hooks"
    process = start_child([sys.executable, "-c", program], tmp_path, tmp_path / "log", 3, {"MINE": "yes"})
    assert process.wait(timeout=120) == 0
    assert (tmp_path / "log").read_text().split() == [str(tmp_path.resolve()), "3", "yes"]


def test_stop(tmp_path):
    process = start_child([sys.executable, "-c", "import time; time.sleep(300)"], tmp_path, tmp_path / "log", 1)
    started = time.monotonic()
    stop_child(process)
    assert process.poll() not in (None, 0)
    assert time.monotonic() - started < 60
    stop_child(process)  # nothing to do


def test_the_tail_shows_a_progress_bar_once(tmp_path):
    file = tmp_path / "log"
    file.write_text("".join(f"line {n}\n" for n in range(30)) + "10 %\r20 %\r30 %\n\nthe end\n")
    lines = log_tail(file).splitlines()
    assert lines[-2:] == ["  30 %", "  the end"]
    assert len(lines) == 15


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert read_json(file) == {"a": 1}
