import os

import pytest

from fgd_hooks.utils.files import read_json, write_json, write_whole


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert read_json(file) == {"a": 1}


def test_a_write_that_fails_half_way_leaves_nothing_behind(tmp_path, monkeypatch):
    file = tmp_path / "a.bin"
    write_whole(file, b"old")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(file, b"new")
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]
