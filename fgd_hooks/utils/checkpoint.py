"""The side file: what distillation adds to a training, beside the host's own checkpoint.

Written to a temporary file in the same folder, flushed to the disk and renamed, so that a reader finds either the old
file or the new one. Read as an untrusted file: no code in it can run, and it cannot make the reader take more memory
than a small multiple of the file's size.
"""

from __future__ import annotations

import contextlib
import os
import pickletools
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fgd_hooks.errors import CheckpointError

LAST_CHECKPOINT = "last.fgd.pt"
"""Name of the file beside a host's ``last.pt``."""

FORMAT = 1


MAX_BYTES = 4 << 30  # adapters and their optimizer take megabytes


MAX_PICKLE_BYTES = 16 << 20  # of names, numbers and structure; kilobytes in practice


MAX_TUPLES = 20_000  # some for each tensor; many inside each other would overflow the C stack


# what torch.save names in the pickle of tensors, numbers, texts and containers of them
_NAMES = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"}


_NAMES |= {f"torch {kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Bool", "Byte")}


_FORBIDDEN = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"}


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors, numbers, texts and containers of them, atomically.

    What an earlier write left behind when its process was killed is removed.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old file is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    descriptor, temporary = tempfile.mkstemp(prefix=_prefix(path), dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file, _checksums():
            torch.save({"fgd_hooks": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, RuntimeError):  # torch reports a failed write as one
            raise OSError(str(error)) from error
        raise


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of writes to ``path`` that were killed; for the one process that writes it."""
    if path.parent.is_dir():
        for leftover in [each for each in path.parent.iterdir() if each.name.startswith(_prefix(path))]:
            leftover.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what :func:`write_checkpoint` wrote, onto the CPU.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is damaged, holds code, declares more than it holds, or is no side file of this format.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no side file {path}.")
    try:
        size = _check_archive(path)
        # mapped: a tensor that claims more than its storage is an error then, and takes no memory
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        content = _own_tensors(content, [size])
    except Exception as error:  # zipfile, pickletools and torch raise many kinds for damaged or unsafe files
        raise CheckpointError(
            f"{path} cannot be read as a side file of fgd_hooks: {error or type(error).__name__}. "
            "Remove it to go on with new adapters."
        ) from error
    kind = content.get("fgd_hooks") if isinstance(content, dict) else None
    if not (isinstance(content, dict) and isinstance(kind, int) and kind == FORMAT):  # a tensor cannot be compared
        raise CheckpointError(f"{path} is no side file of fgd_hooks (format {FORMAT}).")
    return content


def _check_archive(path: Path) -> int:
    """Refuse, before torch reads it, an archive that torch.save would not have written; returns its size in bytes."""
    if not path.is_file():
        raise ValueError("it is no regular file")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"it has {size} bytes; at most {MAX_BYTES} are read")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if len(set(names)) != len(names) or any(".." in name or name.startswith("/") for name in names):
            raise ValueError("names in its archive are repeated or lead out of it")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("its archive is compressed")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("its archive declares more bytes than the file holds")
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of its {damaged} is wrong")
        pickles = [name for name in names if name.endswith(".pkl")]
        if len(pickles) != 1 or pickles[0].count("/") != 1 or not pickles[0].endswith("/data.pkl"):
            raise ValueError("its archive does not hold one data.pkl")
        if archive.getinfo(pickles[0]).file_size > MAX_PICKLE_BYTES:
            raise ValueError(f"its structure takes more than {MAX_PICKLE_BYTES} bytes")
        tuples = 0
        for opcode, argument, _ in pickletools.genops(archive.read(pickles[0])):
            tuples += opcode.name.startswith("TUPLE")
            if tuples > MAX_TUPLES:
                raise ValueError(f"it holds more than {MAX_TUPLES} tuples")
            if opcode.name in _FORBIDDEN or (opcode.name == "GLOBAL" and argument not in _NAMES):
                raise ValueError(f"it names {argument or opcode.name}, which is neither a tensor nor a container")
    return size


def _own_tensors(value: Any, left: list[int], depth: int = 0) -> Any:
    """The content with tensors of its own instead of views of the mapped file.

    Args:
        value: tensors, numbers, texts and containers of them.
        left: one number: how many bytes of tensors may still come; views of one storage would multiply it otherwise.
        depth: how many containers ``value`` is in.
    """
    if depth > 20:
        raise ValueError("its containers are nested too deep")
    if isinstance(value, Tensor):
        left[0] -= value.numel() * value.element_size()
        if left[0] < 0 or value.layout != torch.strided or value.device.type != "cpu":
            raise ValueError(f"its tensors hold more than the file, {tuple(value.shape)} for example")
        return value.detach().clone(memory_format=torch.contiguous_format)
    left[0] -= 1  # each item takes a byte of the file at least, unless the same container comes many times
    if left[0] < 0:
        raise ValueError("its containers hold more than the file")
    if isinstance(value, dict):
        return {_plain(key): _own_tensors(item, left, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_own_tensors(item, left, depth + 1) for item in value])
    return _plain(value)


def _plain(value: Any) -> Any:
    """A number, a text or None.

    Raises:
        ValueError: it is something else.
    """
    if value is not None and type(value) not in (bool, int, float, str):
        raise ValueError(f"it holds a {type(value).__name__}")
    return value


@contextlib.contextmanager
def _checksums() -> Iterator[None]:
    """Let torch.save write checksums, which a process may have switched off (not possible in old versions of torch)."""
    if not hasattr(torch.serialization, "set_crc32_options"):
        yield
        return
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _prefix(path: Path) -> str:
    """How the names of the temporary files of ``path`` begin."""
    return f".{path.name}."


def _umask() -> int:
    """The process's file mode mask; temporary files are private, a side file is an ordinary one."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


MAX_COUNT = 1 << 53  # of steps and epochs; far beyond any training


def check_count(name: str, found: Any) -> int:
    """A number of steps or epochs, from 0.

    Raises:
        ValueError: it is none.
    """
    if type(found) is not int:
        raise ValueError(f"The saved {name} is missing or damaged: found a {type(found).__name__}, expected a count.")
    if not 0 <= found < MAX_COUNT:
        raise ValueError(f"The saved {name} is negative or above {MAX_COUNT}.")
    return found


def check_tensor(name: str, found: Any, like: Tensor, *, finite: bool = False, low: float | None = None) -> Tensor:
    """A tensor of the shape and dtype of ``like``.

    Args:
        name: what it is, for the message.
        found: the saved value.
        like: the tensor that it will be copied to.
        finite: refuse NaN and infinity.
        low: refuse values below it.

    Raises:
        ValueError: it does not fit.
    """
    if not isinstance(found, Tensor) or found.layout != torch.strided or found.is_meta:
        raise ValueError(f"The saved {name} is missing or no plain tensor.")
    if found.shape != like.shape or found.dtype != like.dtype:
        raise ValueError(
            f"The saved {name} is {found.dtype} of shape {tuple(found.shape)}; expected {like.dtype} of shape "
            f"{tuple(like.shape)}."
        )
    if finite and not bool(torch.isfinite(found).all()):
        raise ValueError(f"The saved {name} holds NaN or infinite values.")
    if low is not None and bool((found < low).any()):
        raise ValueError(f"The saved {name} holds values below {low:g}.")
    return found


def adamw_state(optimizer: torch.optim.AdamW, saved: Any) -> dict[str, Any]:
    """What ``optimizer.load_state_dict`` takes: the saved moments and step counts with the optimizer's own settings.

    The settings (learning rate, weight decay, ...) are the configuration's, never the file's.

    Raises:
        ValueError: the saved state does not fit the optimizer's parameters.
    """
    state = saved.get("state") if isinstance(saved, Mapping) else None
    if not isinstance(state, Mapping):
        raise ValueError("The saved optimizer is missing or damaged.")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    checked: dict[int, dict[str, Tensor]] = {}
    for number, entry in state.items():
        if type(number) is not int or not 0 <= number < len(parameters):
            raise ValueError(f"The saved optimizer is of other parameters than these {len(parameters)}.")
        if not isinstance(entry, Mapping):
            raise ValueError("The saved optimizer is missing or damaged.")
        name, parameter = f"optimizer state of parameter {number}", parameters[number].detach()
        scalar = torch.zeros((), dtype=torch.float32)
        checked[number] = {
            "step": check_tensor(f"{name} (step)", entry.get("step"), scalar, finite=True, low=0),
            "exp_avg": check_tensor(f"{name} (exp_avg)", entry.get("exp_avg"), parameter, finite=True),
            "exp_avg_sq": check_tensor(f"{name} (exp_avg_sq)", entry.get("exp_avg_sq"), parameter, finite=True, low=0),
        }
    return {"state": checked, "param_groups": optimizer.state_dict()["param_groups"]}
