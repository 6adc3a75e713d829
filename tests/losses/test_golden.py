"""FGDLoss against vectors that the authors' own code gave (tests/golden/FORMAT.md).

The environment variable FGD_GOLDEN_DIR names another directory with cases of the same format.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fgd_hooks.losses.attention import channel_attention, spatial_attention
from fgd_hooks.losses.fgd import FGDLoss, official_name
from fgd_hooks.masks import PackedBoxes, box_masks
from tests.helpers.reference import slow_fgd, slow_masks

GOLDEN = Path(os.environ.get("FGD_GOLDEN_DIR") or Path(__file__).parents[1] / "golden")
ARRAYS: dict[str, dict[str, np.ndarray]] = {}
for name, array in np.load(GOLDEN / "cases.npz", allow_pickle=False).items():
    ARRAYS.setdefault(name.split("/")[0], {})[name.split("/", 1)[1]] = array
CASES = json.loads((GOLDEN / "manifest.json").read_text())["cases"]
THEIR_PARTS = {"foreground": "fg_loss", "background": "bg_loss", "attention": "mask_loss", "global": "rela_loss"}
DTYPES = [torch.float64, torch.float32]

pytestmark = [
    pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"]),
    pytest.mark.parametrize("dtype", DTYPES, ids=["f64", "f32"]),
]


class Golden:
    """One case, run once through our loss."""

    def __init__(self, case, dtype, fused=True):
        self.case, self.dtype, self.arrays = case, dtype, ARRAYS[case["id"]]
        self.student = self.tensor("in/student").requires_grad_()
        self.teacher = self.tensor("in/teacher")
        boxes = torch.from_numpy(self.arrays["in/boxes"])
        assert boxes.dtype == torch.float32
        self.boxes = list(boxes.split(self.arrays["in/box_count"].tolist()))
        self.canvas = self.arrays["in/img_shape"].tolist()
        names = ("temperature", "alpha", "beta", "gamma", "lambda_")
        hyper = dict(zip(names, self.arrays["in/hyper"].tolist(), strict=True))
        self.loss = FGDLoss(case["Ct"], **hyper, fused=fused).to(dtype)
        state = {k.removeprefix("state/"): self.tensor(k) for k in self.arrays if k.startswith("state/")}
        self.loss.load_official(state)
        self.align = {k: v.requires_grad_() for k, v in state.items() if k.startswith("align.")}
        self.parameters = {official_name(k): v for k, v in self.loss.named_parameters()} | self.align
        self.adapted = self.student
        if self.align:
            self.adapted = F.conv2d(self.student, self.align["align.weight"], self.align["align.bias"])

    def tensor(self, key):
        return torch.from_numpy(self.arrays[key]).to(self.dtype)

    def tolerance(self, key):
        if self.dtype == torch.float64:
            return 1e-10
        recorded = self.case["f32_deviation"]
        # None is recorded for the gradients of single parts: the case's largest tells how well conditioned it is.
        return max(1e-5, 5 * recorded.get(key, max(recorded.values()) if key.startswith("part/") else 0))

    def compare(self, found, key, wanted=None):
        """Largest deviation, relative to the largest wanted number."""
        wanted = torch.from_numpy(np.asarray(self.arrays[key])) if wanted is None else wanted
        found = found.detach().double()
        assert found.isfinite().all()
        deviation = float((found - wanted).abs().max())
        assert deviation <= self.tolerance(key) * float(wanted.abs().max()) + 1e-300, key


def test_parts_and_loss(case, dtype):
    golden = Golden(case, dtype)
    result = golden.loss(golden.adapted, golden.teacher, golden.boxes, golden.canvas)
    wrapped = case["negative_box_coordinate"]
    if wrapped:
        parts = slow_fgd(golden.loss, golden.adapted, golden.teacher, golden.boxes, golden.canvas)
        wanted = {THEIR_PARTS[name]: value.detach().double() for name, value in parts.items()}
        assert abs(float(wanted["fg_loss"]) - golden.arrays["out/fg_loss"]) > 1e-6, "expected to differ here"
        wanted["mask_loss"] = wanted["rela_loss"] = None
    else:
        wanted = dict.fromkeys(THEIR_PARTS.values())
        golden.compare(result.loss, "out/loss")
    for name, theirs in THEIR_PARTS.items():
        golden.compare(result.raw[name], "out/" + theirs, wanted[theirs])
        torch.testing.assert_close(result.parts[name], result.raw[name] * golden.loss.weights[name])


def test_channels_last(case, dtype):
    """As Ultralytics trains on a GPU; the gradient comes in the feature's own order."""
    golden = Golden(case, dtype)
    last = {"memory_format": torch.channels_last}
    student = golden.adapted.detach().contiguous(**last).requires_grad_()
    loss = golden.loss(student, golden.teacher.contiguous(**last), golden.boxes, golden.canvas).loss
    plain = golden.loss(golden.adapted, golden.teacher, golden.boxes, golden.canvas).loss
    wanted = torch.autograd.grad(plain, golden.adapted)[0].double()
    (found,) = torch.autograd.grad(loss, student)
    scale = float(wanted.abs().max())
    assert float((found.double() - wanted).abs().max()) <= (1e-12 if dtype == torch.float64 else 1e-5) * scale
    loss, plain = loss.item(), plain.item()
    assert abs(loss - plain) <= (1e-12 if dtype == torch.float64 else 1e-5) * plain
    assert found.is_contiguous(**last)


def test_masks(case, dtype):
    golden = Golden(case, dtype)
    packed = PackedBoxes.from_list(golden.boxes, golden.canvas)
    masks = box_masks(packed, case["H"], case["W"], dtype)
    slow = slow_masks(golden.boxes, golden.canvas, case["H"], case["W"], dtype)
    for found, reference, key in zip(masks, slow, ("out/mask_fg", "out/mask_bg"), strict=True):
        wanted = reference.double() if case["negative_box_coordinate"] else None
        golden.compare(found, key, wanted)


def test_attentions(case, dtype):
    golden = Golden(case, dtype)
    for feature, which in ((golden.adapted, "s"), (golden.teacher, "t")):
        golden.compare(spatial_attention(feature, golden.loss.temperature), f"out/S_attention_{which}")
        golden.compare(channel_attention(feature, golden.loss.temperature), f"out/C_attention_{which}")


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_gradients(case, dtype, fused):
    golden = Golden(case, dtype, fused)
    inputs = {"student": golden.student, **golden.parameters}
    result = golden.loss(golden.adapted, golden.teacher, golden.boxes, golden.canvas)
    found = dict(zip(inputs, torch.autograd.grad(result.loss, inputs.values()), strict=True))
    if case["negative_box_coordinate"]:
        parts = slow_fgd(golden.loss, golden.adapted, golden.teacher, golden.boxes, golden.canvas)
        total = sum(value * golden.loss.weights[name] for name, value in parts.items())
        wanted = dict(zip(inputs, torch.autograd.grad(total, inputs.values()), strict=True))
    else:
        wanted = {name: torch.from_numpy(golden.arrays["grad/" + name]).view(found[name].shape) for name in found}
    for name, gradient in found.items():
        golden.compare(gradient, "grad/" + name, wanted[name].double())


def test_gradient_of_each_part(case, dtype):
    if not case["has_part_grads"]:
        pytest.skip("no gradients per part in this case")
    golden = Golden(case, dtype)
    raw = golden.loss(golden.adapted, golden.teacher, golden.boxes, golden.canvas).raw
    for name, theirs in THEIR_PARTS.items():
        key = f"part/dstudent_{theirs}"
        (gradient,) = torch.autograd.grad(raw[name], golden.student, retain_graph=True)
        golden.compare(gradient, key)
