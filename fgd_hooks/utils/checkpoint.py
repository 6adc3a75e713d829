"""What distillation adds to a training, in a file beside the host's own checkpoint.

A safetensors file; values that are no tensors, as JSON, and a SHA-256 of the whole are in its metadata. Nothing in
such a file can run, and a damaged one is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fgd_hooks.errors import CheckpointError, needs_extra
from fgd_hooks.utils.files import remove_leftovers, write_whole

SUFFIX = ".fgd.safetensors"
LAST_CHECKPOINT = f"last{SUFFIX}"
"""Name of the file beside a host's ``last.pt``."""

FORMAT = "fgd_hooks 2"
MAX_COUNT = 1 << 53  # of steps and epochs; far beyond any training
MAX_BYTES = 4 << 30  # adapters and their optimizer take megabytes
TENSOR = "__tensor__"  # the key that stands in the values for a tensor, with its name
NO_DIGEST = b"0" * 64  # stands in the file while its digest is taken


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors, numbers, texts and containers of them; a reader finds the old file or the new one.

    As JSON has it, keys are read back as texts and tuples as lists. What an earlier write left behind when its process
    was killed is removed.
    """
    with needs_extra():
        from safetensors.torch import save

    tensors: dict[str, Tensor] = {}

    def named(value: Any) -> dict[str, str]:
        if not isinstance(value, Tensor):
            raise TypeError(f"A checkpoint holds no {type(value).__name__}.")
        name = str(len(tensors))
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()  # safetensors wants each alone
        return {TENSOR: name}

    values = json.dumps(content, default=named)
    data = save(tensors, {"format": FORMAT, "values": values, "sha256": NO_DIGEST.decode()})
    data = data.replace(NO_DIGEST, hashlib.sha256(data).hexdigest().encode(), 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    write_whole(path, data)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what :func:`write_checkpoint` wrote, onto the CPU."""
    with needs_extra():
        from safetensors.torch import load

    if not path.exists():
        older = path.with_suffix(".pt")
        if not older.is_file():
            raise FileNotFoundError(f"There is no checkpoint {path}.")
        raise CheckpointError(f"{older} has the format of an older version. Remove it to go on with new adapters.")
    try:
        if not path.is_file():
            raise ValueError("it is no regular file")
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes; at most {MAX_BYTES} are read")
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']!r}; expected {FORMAT!r}")
        digest = header["sha256"].encode()
        if hashlib.sha256(data.replace(digest, NO_DIGEST, 1)).hexdigest().encode() != digest:
            raise ValueError("its checksum is wrong")
        tensors = load(data)
        content = json.loads(
            header["values"], object_hook=lambda each: tensors[each[TENSOR]] if TENSOR in each else each
        )
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}; expected keys and values")
    except Exception as error:  # json and safetensors raise many kinds for damaged and foreign files
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint of fgd_hooks: {error or type(error).__name__}. "
            "Remove it to go on with new adapters."
        ) from error
    return content


def check_count(name: str, found: Any) -> int:
    """A saved number of steps or epochs, from 0; a ValueError if it is none."""
    if type(found) is not int:
        raise ValueError(f"The saved {name} is missing or damaged: found a {type(found).__name__}, expected a count.")
    if not 0 <= found < MAX_COUNT:
        raise ValueError(f"The saved {name} is negative or above {MAX_COUNT}.")
    return found


def check_tensor(name: str, found: Any, like: Tensor, *, finite: bool = False, low: float | None = None) -> Tensor:
    """A saved tensor of the shape and dtype of ``like``, finite, not below ``low``; a ValueError if it is none."""
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
    """
    state = saved.get("state") if isinstance(saved, Mapping) else None
    parameters = [parameter.detach() for group in optimizer.param_groups for parameter in group["params"]]
    if not isinstance(state, Mapping) or not all(isinstance(entry, Mapping) for entry in state.values()):
        raise ValueError("The saved optimizer is missing or damaged.")
    if not {str(number) for number in state} <= {str(number) for number in range(len(parameters))}:
        raise ValueError(f"The saved optimizer is of other parameters than these {len(parameters)}.")
    checked: dict[int, dict[str, Tensor]] = {}
    for number, entry in ((int(number), entry) for number, entry in state.items()):
        name, like = f"optimizer state of parameter {number}", parameters[number]
        step = check_tensor(f"{name} (step)", entry.get("step"), torch.zeros(()), finite=True, low=0)
        first = check_tensor(f"{name} (exp_avg)", entry.get("exp_avg"), like, finite=True)
        second = check_tensor(f"{name} (exp_avg_sq)", entry.get("exp_avg_sq"), like, finite=True, low=0)
        checked[number] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
    return {"state": checked, "param_groups": optimizer.state_dict()["param_groups"]}
