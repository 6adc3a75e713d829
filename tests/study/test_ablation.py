"""FGD with pieces switched: none switched is FGD itself; each switch by hand; the non-local block by its formula."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fgd_hooks.config import LossConfig
from fgd_hooks.losses.base import LOSSES, create_loss
from fgd_hooks.losses.fgd import FGDLoss
from fgd_hooks.pairing import build_loss
from fgd_hooks.study.spec import load_plugins
from tests.losses.test_golden import CASES, THEIR_PARTS, Golden

load_plugins([str(Path(__file__).parents[2] / "configs" / "studies" / "fgd_ablation.py")])
AblationLoss = LOSSES.get("fgd_ablation")
NonLocalBlock = sys.modules[AblationLoss.__module__].NonLocalBlock

# One image of 2 x 2 cells of one pixel each, two channels. The box 0 0 0 0 covers the cell at the top left alone.
BOX, CANVAS = [torch.zeros(1, 4)], (2, 2)
TEACHER = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[-1.0, 0.0], [2.0, 1.0]]]], dtype=torch.float64)
STUDENT = torch.tensor([[[[0.0, 2.0], [1.0, 1.0]], [[1.0, 1.0], [2.0, -1.0]]]], dtype=torch.float64)
SQUARE = torch.tensor([[[[1.0, 0.0], [4.0, 9.0]], [[4.0, 1.0], [0.0, 4.0]]]], dtype=torch.float64)  # (T - S)^2


def raw(**options: object) -> dict[str, float]:
    loss = AblationLoss(2, alpha=1.0, beta=1.0, gamma=1.0, lambda_=1.0, **options).double()  # type: ignore[arg-type]
    return {name: value.item() for name, value in loss(STUDENT, TEACHER, BOX, CANVAS).raw.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_with_nothing_switched_it_is_fgd(case):
    golden = Golden(case, torch.float64)
    mine = AblationLoss(case["Ct"], golden.loss.temperature, *golden.loss.weights.values()).double()
    mine.load_state_dict(golden.loss.state_dict())
    result = mine(golden.adapted, golden.teacher, golden.boxes, golden.canvas)
    expected = golden.loss(golden.adapted, golden.teacher, golden.boxes, golden.canvas)
    assert set(result.parts) == set(THEIR_PARTS)
    for name in THEIR_PARTS:
        torch.testing.assert_close(result.parts[name], expected.parts[name], rtol=1e-10, atol=1e-300)
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-10, atol=1e-300)
    (gradient,) = torch.autograd.grad(result.loss, golden.student, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected.loss, golden.student)
    torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-12 * float(wanted.abs().max()))


def test_a_preset_counts_as_for_fgd():
    mine = build_loss(LossConfig(name="fgd_ablation", preset="fcos"), 4)
    assert (mine.alpha, mine.temperature) == (1.6e-3, 0.8)  # the paper's, for FCOS


def test_without_attentions_a_cell_weighs_its_mask():
    found = raw(spatial=False, channel=False)
    # the squares summed over the channels are 5, 1, 4 and 13; the box covers columns and rows floor(0) to ceil(0)
    assert found["foreground"] == pytest.approx(5.0 / 1)
    assert found["background"] == pytest.approx((1.0 + 4.0 + 13.0) / 3)


def test_without_the_spatial_attention_the_channels_still_count():
    # mean |T| per channel: 2.5 and 1; C * softmax of (2.5, 1) / 0.5
    channel = 2 * torch.softmax(torch.tensor([5.0, 2.0]), 0)
    expected = 1.0 * channel[0] + 4.0 * channel[1]
    assert raw(spatial=False)["foreground"] == pytest.approx(expected.item(), rel=1e-6)


def test_without_the_channel_attention_the_cells_still_count():
    # mean |T| per cell: 1, 1, 2.5, 2.5; H * W * softmax over T = 0.5
    spatial = 4 * torch.softmax(torch.tensor([2.0, 2.0, 5.0, 5.0]), 0)
    assert raw(channel=False)["foreground"] == pytest.approx(5.0 * spatial[0].item(), rel=1e-6)


@pytest.mark.parametrize(
    ("scale", "foreground", "background"),
    [
        # Boxes: one cell (0, 0), and the upper row (0, 0) and (0, 1). Their areas are 1 and 2 cells.
        ("boxes", 5.0 / 1 + 1.0 / 2, (4.0 + 13.0) / 2),
        ("image", (5.0 + 1.0) / 2, (4.0 + 13.0) / 2),
        ("none", 5.0 + 1.0, 4.0 + 13.0),
    ],
)
def test_scale_mask(scale, foreground, background):
    boxes = [torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])]
    loss = AblationLoss(2, scale=scale, spatial=False, channel=False).double()
    found = loss(STUDENT, TEACHER, boxes, CANVAS).raw
    assert found["foreground"].item() == pytest.approx(foreground)
    assert found["background"].item() == pytest.approx(background)


def test_an_image_without_boxes_has_no_foreground():
    for scale in ("boxes", "image", "none"):
        found = AblationLoss(2, scale=scale).double()(STUDENT, TEACHER, [torch.zeros(0, 4)], CANVAS).raw
        assert found["foreground"].item() == 0


def test_identity_relation_is_the_squared_difference():
    assert raw(relation="identity")["global"] == pytest.approx(SQUARE.sum().item())


def test_nonlocal_relation_begins_as_identity_and_learns():
    torch.manual_seed(0)
    loss = AblationLoss(2, relation="nonlocal", lambda_=1.0).double()
    result = loss(STUDENT, TEACHER, BOX, CANVAS)
    assert result.raw["global"].item() == pytest.approx(SQUARE.sum().item())
    result.loss.backward()
    assert loss.student_context.out.weight.grad.abs().sum() > 0
    assert loss.teacher_context.out.weight.grad.abs().sum() > 0


def test_nonlocal_block_is_its_formula():
    torch.manual_seed(1)
    block = NonLocalBlock(4).double()
    torch.nn.init.normal_(block.out.weight)
    torch.nn.init.normal_(block.out.bias)
    feature = torch.randn(2, 4, 2, 3, dtype=torch.float64)
    found = block(feature)
    for image in range(2):
        cells = [feature[image, :, row, column] for row in range(2) for column in range(3)]
        for number, cell in enumerate(cells):
            weights = torch.stack([block.theta(cell) @ block.phi(other) for other in cells]).exp()
            mixed = sum(weight * block.g(other) for weight, other in zip(weights / weights.sum(), cells, strict=True))
            expected = cell + block.out(mixed)
            torch.testing.assert_close(found[image, :, number // 3, number % 3], expected)


def test_a_part_of_weight_zero_is_zero():
    loss = AblationLoss(2, alpha=0, gamma=0, lambda_=0).double()
    found = loss(STUDENT, TEACHER, BOX, CANVAS).parts
    assert [found[name].item() for name in ("foreground", "attention", "global")] == [0, 0, 0]
    assert found["background"].item() > 0


def test_it_is_registered_and_checks_its_options():
    assert isinstance(create_loss("fgd_ablation", channels=4, scale="image"), FGDLoss)
    with pytest.raises(ValueError, match="'nonlocal'"):
        AblationLoss(4, relation="non_local")
    with pytest.raises(ValueError, match="scale is 'box'.*'boxes'"):
        AblationLoss(4, scale="box")
