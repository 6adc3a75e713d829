import os
import stat
import warnings
import zipfile

import psutil
import pytest
import torch

from fgd_hooks.errors import CheckpointError
from fgd_hooks.utils import checkpoint as sidefile
from fgd_hooks.utils.checkpoint import read_checkpoint, remove_leftovers, write_checkpoint


def test_written_and_read(tmp_path):
    path = tmp_path / "new" / "last.fgd.pt"
    write_checkpoint(path, {"epoch": 3, "tensors": {"a": torch.arange(3)}})
    content = read_checkpoint(path)
    assert content["epoch"] == 3
    assert torch.equal(content["tensors"]["a"], torch.arange(3))
    assert [f.name for f in path.parent.iterdir()] == ["last.fgd.pt"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.fgd.pt"
    write_checkpoint(path, {"epoch": 1})

    def full(content, file):
        file.write(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")

    monkeypatch.setattr(sidefile.torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(path, {"epoch": 2})
    monkeypatch.undo()
    assert read_checkpoint(path)["epoch"] == 1
    assert [f.name for f in tmp_path.iterdir()] == ["last.fgd.pt"]


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_code_in_a_side_file_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"fgd_hooks": 1, "bomb": Bomb()}, "bomb.pt")
    with pytest.raises(CheckpointError, match=r"bomb\.pt"):
        read_checkpoint(tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"epoch": 1}, tmp_path / "other.pt")
    for name in ("text.pt", "other.pt"):
        with pytest.raises(CheckpointError, match=name):
            read_checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "none.pt")


# crafted files


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """The same archive with other entries: ``change`` maps [(name, bytes)] to such a list."""
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names given twice
        for name, content in change(entries):
            archive.writestr(name, content)


def in_pickle(old, new):
    def change(entries):
        assert any(name.endswith("data.pkl") and old in content for name, content in entries)
        return [
            (name, content.replace(old, new) if name.endswith("data.pkl") else content) for name, content in entries
        ]

    return change


def pickle_of(code):
    return lambda entries: [(n, b"\x80\x02" + code if n.endswith(".pkl") else c) for n, c in entries]


@pytest.fixture
def path(tmp_path):
    write_checkpoint(tmp_path / "last.fgd.pt", {"a": torch.arange(1000.0)})
    return tmp_path / "last.fgd.pt"


THOUSAND, MUCH = b"M\xe8\x03", b"J\x00\x00\x00\x70"  # 1000 and 1.9e9 in a pickle


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (in_pickle(THOUSAND, MUCH), "cannot be read"),  # a storage and a tensor of 7 GB
        (in_pickle(THOUSAND + b"\x85", MUCH + b"\x85"), "cannot be read"),  # the tensor alone
        (lambda entries: [*entries, ("last.fgd/../../evil", b"x")], "lead out"),
        (lambda entries: [*entries, ("/evil", b"x")], "lead out"),
        (lambda entries: [*entries, entries[0]], "repeated"),
        (lambda entries: [*entries, ("last.fgd/b/data.pkl", entries[0][1])], "one data.pkl"),
        (lambda entries: entries[1:], "one data.pkl"),
        (pickle_of(b"}" + b"(" * 9), "cannot be read"),
        (pickle_of(b")" + b"\x85" * 10**6 + b"."), "tuples"),
        (pickle_of(b"]" * 10**5 + b"a" * (10**5 - 1) + b"."), "deep"),
    ],
)  # fmt: skip
def test_a_crafted_archive_is_refused(path, change, words):
    rewritten(path, change)
    memory = psutil.Process().memory_info().rss
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(path)
    assert psutil.Process().memory_info().rss - memory < 2**28


def test_a_compressed_archive_is_refused(path):
    """A megabyte of it could hold a gigabyte."""
    rewritten(path, lambda entries: entries, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(1).expand(10**6, 10**6),
        [torch.ones(10_000)] * 3,  # one storage, held three times
        bytearray(3),
        b"bytes",
        {1, 2},
        1j,
        torch.float32,
        torch.Size([1]),
        torch.nn.Parameter(torch.ones(1)),
        torch.ones(2, device="meta"),
        torch.eye(2).to_sparse(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_no_side_file_holds_is_refused(tmp_path, value):
    torch.save({"fgd_hooks": 1, "a": value}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "a.pt")


def test_a_huge_file_is_refused_unread(tmp_path):
    with open(tmp_path / "a.pt", "wb") as file:
        file.truncate(sidefile.MAX_BYTES + 1)  # takes no room on the disk
    with pytest.raises(CheckpointError, match="bytes"):
        read_checkpoint(tmp_path / "a.pt")


def test_a_flipped_bit_is_seen(path):
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(1000.0)[500:504].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        read_checkpoint(path)


def test_checksums_are_written_whatever_the_process_has_set(tmp_path):
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("this torch always writes them")
    torch.serialization.set_crc32_options(False)
    try:
        write_checkpoint(tmp_path / "a.pt", {"a": torch.ones(5)})
        assert torch.serialization.get_crc32_options() is False
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(tmp_path / "a.pt")["a"].sum() == 5


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "folder.pt").mkdir()
    for name in ("pipe.pt", "folder.pt"):
        with pytest.raises(CheckpointError, match="no regular file"):
            read_checkpoint(tmp_path / name)


def test_a_write_does_not_follow_a_link(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "last.fgd.pt").symlink_to(tmp_path / "precious")
    write_checkpoint(tmp_path / "last.fgd.pt", {"epoch": 1})
    assert (tmp_path / "precious").read_text() == "mine"
    assert read_checkpoint(tmp_path / "last.fgd.pt")["epoch"] == 1


def test_what_killed_writes_left_is_removed(tmp_path):
    for name in (".last.fgd.pt.abc", ".last.fgd.pt.def", ".other.pt.abc", "last.pt"):
        (tmp_path / name).write_text("half")
    write_checkpoint(tmp_path / "last.fgd.pt", {"epoch": 1})
    assert sorted(file.name for file in tmp_path.iterdir()) == [".other.pt.abc", "last.fgd.pt", "last.pt"]
    remove_leftovers(tmp_path / "nowhere" / "last.fgd.pt")


def test_a_tensor_where_the_format_should_be(tmp_path):
    torch.save({"fgd_hooks": torch.zeros(0)}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="no side file"):
        read_checkpoint(tmp_path / "x")


def test_what_is_read_is_bit_equal_and_the_readers_own(tmp_path):
    path = tmp_path / "a.pt"
    odd = torch.tensor([0.1, -0.0, 1e-45, torch.inf, torch.nan])
    content = {
        "float": odd, "half": odd.bfloat16(), "double": odd.double(), "int": torch.tensor(2**62), "bool": odd > 0,
        "strided": torch.arange(6.0).view(2, 3).t(), "state": {0: {"step": torch.tensor(3.0)}},
        "betas": (0.9, 0.999), "none": None,
    }  # fmt: skip
    write_checkpoint(path, content)
    found = read_checkpoint(path)
    path.write_bytes(b"")  # the tensors do not look into the file any more
    assert found.pop("fgd_hooks") == 1
    assert found["betas"] == (0.9, 0.999) and found["none"] is None and found["state"][0]["step"] == 3
    for name in ("float", "half", "double", "int", "bool", "strided"):
        expected = content[name].contiguous()
        assert found[name].dtype == expected.dtype
        assert found[name].view(-1).view(torch.uint8).tolist() == expected.view(-1).view(torch.uint8).tolist()
