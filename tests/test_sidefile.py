import os
import stat

import pytest
import torch

from fgd_hooks import sidefile
from fgd_hooks.sidefile import SideFileError, read_side_file, write_side_file


def test_written_and_read(tmp_path):
    path = tmp_path / "new" / "last.fgd.pt"
    write_side_file(path, {"epoch": 3, "tensors": {"a": torch.arange(3)}})
    content = read_side_file(path)
    assert content["epoch"] == 3
    assert torch.equal(content["tensors"]["a"], torch.arange(3))
    assert [f.name for f in path.parent.iterdir()] == ["last.fgd.pt"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.fgd.pt"
    write_side_file(path, {"epoch": 1})

    def full(content, file):
        file.write(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")

    monkeypatch.setattr(sidefile.torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        write_side_file(path, {"epoch": 2})
    monkeypatch.undo()
    assert read_side_file(path)["epoch"] == 1
    assert [f.name for f in tmp_path.iterdir()] == ["last.fgd.pt"]


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_code_in_a_side_file_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"fgd_hooks": 1, "bomb": Bomb()}, "bomb.pt")
    with pytest.raises(SideFileError, match=r"bomb\.pt"):
        read_side_file(tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"epoch": 1}, tmp_path / "other.pt")
    for name in ("text.pt", "other.pt"):
        with pytest.raises(SideFileError, match=name):
            read_side_file(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_side_file(tmp_path / "none.pt")
