"""Plain imitation, against values computed by hand."""

from __future__ import annotations

import pytest
import torch

from fgd_hooks.losses.base import create_loss
from fgd_hooks.losses.imitation import ImitationLoss
from fgd_hooks.masks import PackedBoxes

CANVAS = (20, 20)
# On a 2 x 2 map of a 20 x 20 canvas, 1..9 pixels are cells 0..1 in x and, in y, 11..19 is row 1 (and 2, cut off).
BOXES = [torch.tensor([[1.0, 11.0, 9.0, 19.0]]), torch.zeros(0, 4)]


def features(dtype=torch.float32):
    student = torch.zeros(2, 3, 2, 2, dtype=dtype)
    teacher = torch.zeros(2, 3, 2, 2, dtype=dtype)
    teacher[0, 0] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    student[1, 2, 0, 0] = 5.0
    return student.requires_grad_(), teacher


def test_all():
    student, teacher = features()
    result = ImitationLoss(alpha=0.1)(student, teacher, BOXES, CANVAS)
    assert float(result.raw["imitation"]) == (1 + 4 + 9 + 16 + 25) / 2
    assert float(result.loss) == pytest.approx(0.1 * 27.5)
    result.loss.backward()
    torch.testing.assert_close(student.grad, 0.1 * (student.detach() - teacher))  # 2 alpha / N


def test_split():
    student, teacher = features()
    loss = ImitationLoss(mode="split", alpha=0.1, beta=0.01)
    for boxes, canvas in ((BOXES, CANVAS), (PackedBoxes.from_list(BOXES, CANVAS), None)):
        result = loss(student, teacher, boxes, canvas)
        assert list(result.parts) == list(loss.part_names) == ["foreground", "background"]
        assert float(result.raw["foreground"]) == (9 + 16) / 2
        assert float(result.raw["background"]) == (1 + 4 + 25) / 2
        assert float(result.loss) == pytest.approx(0.1 * 12.5 + 0.01 * 15)


def test_membership_does_not_depend_on_scale():
    student, teacher = torch.zeros(1, 2, 8, 8), torch.ones(1, 2, 8, 8)
    large, small = torch.tensor([[0.0, 0, 60, 60]]), torch.tensor([[10.0, 10, 20, 20]])
    loss = ImitationLoss(mode="split")
    one, two = (loss(student, teacher, [b], (80, 80)).raw for b in (large, torch.cat((large, small))))
    assert float(one["foreground"]) == float(two["foreground"]) == 2 * 7 * 7


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 1.0), (1.0, 0.0)])
def test_weight_zero(alpha, beta):
    student, teacher = features()
    result = ImitationLoss(mode="split", alpha=alpha, beta=beta)(student, teacher, BOXES, CANVAS)
    assert float(result.parts["foreground"]) == alpha * 12.5
    assert float(result.parts["background"]) == beta * 15


def test_half_precision_does_not_overflow():
    student, teacher = features(torch.float16)
    result = ImitationLoss(alpha=1.0)(student, teacher + 6e4, BOXES, CANVAS)
    assert result.loss.dtype == torch.float32 and result.loss.isfinite()


def test_teacher_takes_no_gradient():
    student, teacher = features()
    ImitationLoss()(student, teacher.requires_grad_(), BOXES, CANVAS).loss.backward()
    assert teacher.grad is None and student.grad is not None


def test_registered_and_errors():
    assert isinstance(create_loss("imitation", channels=3, mode="split"), ImitationLoss)
    student, teacher = features()
    with pytest.raises(ValueError, match="built for 4 channels"):
        ImitationLoss(channels=4)(student, teacher, BOXES, CANVAS)
    with pytest.raises(ValueError, match="mode"):
        ImitationLoss(mode="half")
    with pytest.raises(ValueError, match="beta"):
        ImitationLoss(beta=-1.0)
