"""For each model: the right levels, three steps of a pair, and both models as they were.

``FGD_ZOO_OUT=file.jsonl`` also writes a line for each model, of which ``python -m tests.zoo.page`` makes
docs/compatibility.md.
"""

import copy
import json
import os

import pytest
import torch

from fgd_hooks import Distiller
from fgd_hooks.taps.levels import find_levels
from fgd_hooks.utils.preserve import bit_equal
from tests.zoo.models import ZOO

pytestmark = pytest.mark.slow
CONFIG = {"balance": {"mode": "fixed"}, "schedule": {"stop": None}}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks(model):
    """How many hooks of ours each module has; transformers installs some of its own in a first pass, and keeps them."""
    return [
        sum(type(hook).__module__.startswith("fgd_hooks") for hook in getattr(module, kind).values())
        for module in model.modules()
        for kind in HOOKS
    ]


def record(entry, levels, **more):
    if path := os.environ.get("FGD_ZOO_OUT"):
        taps = [[level.name, level.channels, str(level.tap)] for level in levels]
        with open(path, "a") as file:
            file.write(json.dumps({"package": entry.package, "model": entry.name, "levels": taps, **more}) + "\n")


@pytest.mark.parametrize("entry", ZOO, ids=str)
def test_the_levels_are_right_and_a_pair_trains(entry):
    pytest.importorskip(entry.package, reason=f"{entry.package} is not installed")
    torch.manual_seed(0)
    student = entry.make().train()
    before, state = hooks(student), copy.deepcopy(student.state_dict())
    everything = [dict(getattr(module, kind)) for module in student.modules() for kind in HOOKS]
    levels = find_levels(student)
    assert [dict(getattr(module, kind)) for module in student.modules() for kind in HOOKS] == everything
    assert all(bit_equal(value, state[name]) for name, value in student.state_dict().items())
    assert tuple((level.stride, level.channels) for level in levels) == entry.levels
    if not entry.trains:
        return record(entry, levels, trains=False)

    torch.manual_seed(1)
    teacher = entry.make()
    state, images = copy.deepcopy(teacher.state_dict()), torch.rand(2, 3, *levels[0].canvas)
    boxes = [torch.tensor([[8.0, 8.0, 120.0, 90.0]]), torch.zeros(0, 4)]
    with Distiller(student, teacher=teacher, config=CONFIG) as distiller:
        optimizer = torch.optim.AdamW([*student.parameters(), *distiller.parameters()], 1e-4)
        for _ in range(3):
            optimizer.zero_grad()
            student(images)
            distiller(images, boxes).loss.backward()
            optimizer.step()
    learned = [n for n, p in student.named_parameters() if n.startswith(entry.neck) and p.grad is not None]
    assert learned
    assert all(bit_equal(value, state[name]) for name, value in teacher.state_dict().items())
    assert hooks(student) == before
    record(entry, levels, trains=True)
