import hashlib
import json
import os
import stat
import threading

import pytest
import torch

pytest.importorskip("safetensors")

from safetensors.torch import save

from fgd_hooks.errors import CheckpointError
from fgd_hooks.utils import checkpoint
from fgd_hooks.utils.checkpoint import FORMAT, LAST_CHECKPOINT, adamw_state, read_checkpoint, write_checkpoint
from fgd_hooks.utils.files import remove_leftovers


@pytest.fixture
def path(tmp_path):
    write_checkpoint(tmp_path / LAST_CHECKPOINT, {"a": torch.arange(1000.0), "epoch": 1})
    return tmp_path / LAST_CHECKPOINT


def test_written_and_read(tmp_path):
    path = tmp_path / "new" / LAST_CHECKPOINT
    write_checkpoint(path, {"epoch": 3, "tensors": {"a": torch.arange(3)}})
    content = read_checkpoint(path)
    assert content["epoch"] == 3
    assert torch.equal(content["tensors"]["a"], torch.arange(3))
    assert [f.name for f in path.parent.iterdir()] == [LAST_CHECKPOINT]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="permissions of POSIX")
def test_it_has_the_permissions_of_an_ordinary_file(tmp_path):
    (tmp_path / "ordinary").touch()
    write_checkpoint(tmp_path / LAST_CHECKPOINT, {})
    assert stat.S_IMODE((tmp_path / LAST_CHECKPOINT).stat().st_mode) == stat.S_IMODE(
        (tmp_path / "ordinary").stat().st_mode
    )


def test_the_processs_mask_is_never_touched(tmp_path, monkeypatch):
    """It belongs to all threads: one that made a file meanwhile would make it open to everybody."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the mask was changed"))
    write_checkpoint(tmp_path / LAST_CHECKPOINT, {})


def test_what_is_read_is_bit_equal_and_the_readers_own(tmp_path):
    path = tmp_path / LAST_CHECKPOINT
    odd, shared = torch.tensor([0.1, -0.0, 1e-45, torch.inf, torch.nan]), torch.arange(12.0)
    tensors = {
        "float": odd, "half": odd.half(), "bfloat16": odd.bfloat16(), "double": odd.double(), "bool": odd > 0,
        "int": torch.tensor(2**62), "byte": torch.arange(3, dtype=torch.uint8), "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0), "empty of a shape": torch.zeros(3, 0), "whole": shared, "the same": shared,
        "part": shared[2:8], "strided": shared.view(3, 4).t(), "expanded": torch.ones(1).expand(2, 3),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }  # fmt: skip
    plain = {
        "state": {"0": {"x": None}, "1": {}}, "deep": [[[], {}], [1, 2.5, "text", True]],
        "numbers": [0.1, 1e-300, -0.0, 2**70, float("inf")],
    }  # fmt: skip
    write_checkpoint(path, {**tensors, **plain})
    found = read_checkpoint(path)
    path.write_bytes(b"")  # the tensors do not look into the file
    assert list(found) == [*tensors, *plain]
    assert {name: found[name] for name in plain} == plain
    assert str(found["numbers"][2]) == "-0.0" and type(found["deep"][1][3]) is bool
    for name, tensor in tensors.items():
        expected = tensor.detach().contiguous()
        assert type(found[name]) is torch.Tensor and found[name].is_contiguous()
        assert (found[name].dtype, found[name].shape) == (expected.dtype, expected.shape)
        assert found[name].view(-1).view(torch.uint8).tolist() == expected.view(-1).view(torch.uint8).tolist(), name
    found["whole"].zero_()
    assert found["the same"][1] == 1, "each tensor is alone"


def test_keys_become_texts_and_tuples_lists(tmp_path):
    write_checkpoint(tmp_path / LAST_CHECKPOINT, {"state": {0: torch.ones(1)}, "betas": (0.9, 0.999)})
    assert read_checkpoint(tmp_path / LAST_CHECKPOINT) == {"state": {"0": torch.ones(1)}, "betas": [0.9, 0.999]}


def test_adamw_goes_on_bit_for_bit(tmp_path):
    """Also after some steps in which a parameter had no gradient; the learning rate is the configuration's."""

    def begin(lr=0.1):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 2), (), (4,), (5,))]
        return weights, torch.optim.AdamW(weights, lr=lr)

    def train(weights, optimizer, steps):
        for step in steps:
            for number, weight in enumerate(weights):
                weight.grad = torch.full_like(weight, step + 0.3) if number != 2 or step == 3 else None
            optimizer.step()

    weights, optimizer = begin()
    train(weights, optimizer, range(3))
    write_checkpoint(tmp_path / LAST_CHECKPOINT, {"optimizer": optimizer.state_dict(), "weights": weights})
    again, other = begin(lr=7.0)
    saved = read_checkpoint(tmp_path / LAST_CHECKPOINT)
    other.load_state_dict(adamw_state(other, saved["optimizer"]))
    assert other.param_groups[0]["lr"] == 7.0
    other.param_groups[0]["lr"] = 0.1
    with torch.no_grad():
        for weight, value in zip(again, saved["weights"], strict=True):
            weight.copy_(value)
    train(weights, optimizer, range(3, 6))
    train(again, other, range(3, 6))
    assert all(torch.equal(*pair) for pair in zip(weights, again, strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda saved: saved.pop("state"), "missing or damaged"),
        (lambda saved: saved["state"].update({"0": 3}), "missing or damaged"),
        (lambda saved: saved["state"].update({"2": saved["state"]["0"]}), "of other parameters than these 2"),
        (lambda saved: saved["state"].update({"-1": saved["state"]["0"]}), "of other parameters"),
        (lambda saved: saved["state"]["0"].pop("step"), r"parameter 0 \(step\) is missing"),
        (lambda saved: saved["state"]["1"].update(exp_avg=torch.ones(3)), r"of shape \(3,\); expected .*\(2,\)"),
        (lambda saved: saved["state"]["1"]["exp_avg"].fill_(torch.nan), "NaN or infinite"),
        (lambda saved: saved["state"]["1"]["exp_avg_sq"].fill_(-1), "below 0"),
    ],
    ids=range(8),
)
def test_a_state_of_another_optimizer_is_refused(tmp_path, change, words):
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW(weights)
    for weight in weights:
        weight.grad = torch.ones(2)
    optimizer.step()
    write_checkpoint(tmp_path / LAST_CHECKPOINT, optimizer.state_dict())
    saved = read_checkpoint(tmp_path / LAST_CHECKPOINT)
    assert adamw_state(optimizer, saved)["state"].keys() == {0, 1}
    change(saved)
    with pytest.raises(ValueError, match=words):
        adamw_state(optimizer, saved)


def test_nothing_but_metadata_is_valid_too(tmp_path):
    write_checkpoint(tmp_path / LAST_CHECKPOINT, {"epoch": 1})
    assert read_checkpoint(tmp_path / LAST_CHECKPOINT) == {"epoch": 1}


def test_other_programs_can_read_the_tensors(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        assert [file.get_tensor(name).sum() for name in file.keys()] == [499_500]  # noqa: SIM118  (it is no dict)


@pytest.mark.parametrize(
    "value",
    [bytearray(3), b"bytes", {1, 2}, 1j, torch.float32, torch.nn.Linear(1, 1)],
    ids=lambda value: type(value).__name__,
)
def test_what_no_checkpoint_holds_is_not_written(path, value):
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_checkpoint(path, {"a": value})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(path, monkeypatch, step):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(path, {"epoch": 2})
    monkeypatch.undo()
    assert read_checkpoint(path)["epoch"] == 1
    assert list(path.parent.iterdir()) == [path]


def test_a_reader_finds_the_old_file_or_the_new_one(path):
    """While another thread writes it again and again."""
    done = threading.Event()

    def write():
        for epoch in range(30):
            write_checkpoint(path, {"epoch": epoch, "tensor": torch.full((10_000,), epoch)})
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        content = read_checkpoint(path)
        assert "a" in content or bool((content["tensor"] == content["epoch"]).all())
    writer.join()


def test_a_write_does_not_follow_a_link(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / LAST_CHECKPOINT).symlink_to(tmp_path / "precious")
    write_checkpoint(tmp_path / LAST_CHECKPOINT, {"epoch": 1})
    assert (tmp_path / "precious").read_text() == "mine"
    assert read_checkpoint(tmp_path / LAST_CHECKPOINT)["epoch"] == 1


def test_what_killed_writes_left_is_removed(tmp_path):
    for name in (f".{LAST_CHECKPOINT}.abc", f".{LAST_CHECKPOINT}.{os.getpid()}", ".other.pt.abc", "last.pt"):
        (tmp_path / name).write_text("half")
    write_checkpoint(tmp_path / LAST_CHECKPOINT, {"epoch": 1})
    assert sorted(file.name for file in tmp_path.iterdir()) == [".other.pt.abc", LAST_CHECKPOINT, "last.pt"]
    remove_leftovers(tmp_path / "nowhere" / LAST_CHECKPOINT)


# files that are damaged, foreign or made to do harm


def refused(path, words):
    with pytest.raises(CheckpointError, match=words) as raised:
        read_checkpoint(path)
    assert path.name in str(raised.value) and "\n" not in str(raised.value)
    assert "Remove it to go on with new adapters" in str(raised.value)


def test_there_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=LAST_CHECKPOINT):
        read_checkpoint(tmp_path / LAST_CHECKPOINT)


def test_a_file_of_an_older_version_is_named(tmp_path):
    torch.save({"fgd_hooks": 1}, tmp_path / "last.fgd.pt")
    with pytest.raises(CheckpointError, match=r"last\.fgd\.pt has the format of an older version\. Remove it"):
        read_checkpoint(tmp_path / LAST_CHECKPOINT)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_code_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"fgd_hooks": 1, "bomb": Bomb()}, LAST_CHECKPOINT)
    refused(tmp_path / LAST_CHECKPOINT, "cannot be read")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "content", [b"", b"hello", bytes(8), bytes(1000), b"\xff" * 100, b"[" * 100_000, (2).to_bytes(8, "little") + b"{}"]
)
def test_what_is_no_checkpoint_is_refused(path, content):
    path.write_bytes(content)
    refused(path, "cannot be read")


def signed(values, tensors=None, form=FORMAT):
    """A file whose digest is right, whatever is in it."""
    data = save(tensors or {}, {"format": form, "values": values, "sha256": "0" * 64})
    return data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1)


@pytest.mark.parametrize(
    "content",
    [
        save({"a": torch.ones(1)}),
        save({"a": torch.ones(1)}, {"format": "pt"}),
        signed("{}", form="fgd_hooks 3"),
        signed("no json"),
        signed("3"),
        signed("[]"),
        signed(json.dumps({"__tensor__": "a"}), {"a": torch.ones(3, 2)}),
        signed(json.dumps({"a": {"__tensor__": "missing"}})),
        signed(json.dumps({"a": {"__tensor__": ["a"]}})),
        signed("[" * 100_000),
    ],
    ids=range(10),
)
def test_a_crafted_file_is_refused(path, content):
    path.write_bytes(content)
    refused(path, "cannot be read")


def test_tensors_that_claim_more_than_the_file_are_refused(path):
    """Although the digest is right; nothing of that size is made."""
    data = path.read_bytes()
    digest = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["sha256"].encode()
    data = data.replace(digest, b"0" * 64, 1).replace(b'"shape":[1000]', b'"shape":[9999]', 1)
    path.write_bytes(data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1))
    refused(path, "cannot be read")


def test_any_flipped_bit_is_seen(path):
    whole = path.read_bytes()
    for place in [*range(0, len(whole), 97), *range(600)]:
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
        refused(path, "cannot be read")
    content = bytearray(whole)
    content[-1] ^= 1
    path.write_bytes(content)
    refused(path, "checksum")


def test_any_cut_and_any_addition_is_seen(path):
    whole = path.read_bytes()
    for content in (*(whole[:size] for size in range(0, len(whole), 97)), whole + b"x", whole + whole):
        path.write_bytes(content)
        refused(path, "cannot be read")


def test_a_huge_file_is_refused_unread(path):
    with open(path, "wb") as file:
        file.truncate(checkpoint.MAX_BYTES + 1)  # takes no room on the disk
    refused(path, "bytes")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "folder.pt").mkdir()
    for name in ("pipe.pt", "folder.pt"):
        refused(tmp_path / name, "no regular file")


def test_without_safetensors_the_command_to_install_it_is_named(path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    for use in (read_checkpoint, lambda path: write_checkpoint(path, {})):
        with pytest.raises(ImportError, match="pip install"):
            use(path)
