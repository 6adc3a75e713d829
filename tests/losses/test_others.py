"""The losses beside FGD, against values computed by hand from their papers' equations."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from fgd_hooks import Distiller
from fgd_hooks.losses.base import create_loss
from fgd_hooks.losses.cwd import CWDLoss
from fgd_hooks.losses.mgd import MGDLoss
from fgd_hooks.losses.pkd import PKDLoss
from fgd_hooks.losses.scored import ScoredLoss
from tests.helpers.tiny import TinyDetector, batch, trained

NO_BOXES = [torch.zeros(0, 4), torch.zeros(0, 4)]
CANVAS = (8, 8)


def call(loss, student, teacher):
    return loss(student, teacher, NO_BOXES[: len(student)], CANVAS)


def test_channelwise_by_hand():
    """Two cells: the teacher's distribution is (3/4, 1/4), the student's (1/2, 1/2) at temperature 2."""
    student = torch.zeros(1, 1, 1, 2, requires_grad=True)
    teacher = torch.tensor([2 * math.log(3.0), 0.0]).view(1, 1, 1, 2)
    result = call(CWDLoss(temperature=2.0, alpha=3.0), student, teacher)
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert result.raw["channelwise"].item() == pytest.approx(4 * divergence)
    assert result.loss.item() == pytest.approx(12 * divergence)
    result.loss.backward()
    # d/ds of the divergence is (p_s - p_t) / T, times T^2 and alpha
    torch.testing.assert_close(student.grad.flatten(), 3 * 2 * torch.tensor([-0.25, 0.25]))


def test_channelwise_is_a_mean_over_channels_and_images():
    student, teacher = torch.zeros(1, 1, 1, 2), torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    one = call(CWDLoss(), student, teacher).loss
    again = call(CWDLoss(), student.repeat(2, 3, 1, 1), teacher.repeat(2, 3, 1, 1)).loss
    torch.testing.assert_close(again, one)


def test_pearson_is_one_minus_the_correlation():
    student = torch.tensor([1.0, 2.0, 4.0, 9.0]).view(1, 1, 2, 2)
    teacher = torch.tensor([2.0, 1.0, 5.0, 4.0]).view(1, 1, 2, 2)
    s, t = student.flatten() - 4, teacher.flatten() - 3
    correlation = float((s * t).sum() / (s.square().sum() * t.square().sum()).sqrt())
    result = call(PKDLoss(alpha=6.0), student, teacher)
    # the squares sum to 2 (n - 1) (1 - r) for a sample's standard deviation, and are divided by 2 n
    assert float(result.raw["pearson"]) == pytest.approx(3 / 4 * (1 - correlation), rel=1e-5)
    assert float(result.loss) == pytest.approx(6 * 3 / 4 * (1 - correlation), rel=1e-5)


def test_pearson_ignores_scale_and_offset_of_each_channel():
    feature = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    scale, offset = torch.tensor([2.0, 50.0, 0.1]).view(1, 3, 1, 1), torch.tensor([0.0, -7.0, 3.0]).view(1, 3, 1, 1)
    assert float(call(PKDLoss(), feature * scale + offset, feature).loss) == pytest.approx(0, abs=1e-6)


def test_pearson_of_a_constant_channel_is_finite():
    student = torch.full((1, 2, 2, 2), 5.0, requires_grad=True)
    result = call(PKDLoss(), student, torch.rand(1, 2, 2, 2))
    result.loss.backward()
    assert result.loss.isfinite()
    assert student.grad.isfinite().all()


def test_generation_by_hand():
    """Generation blocks that copy: what is blanked costs the teacher's square there, the rest the difference's."""
    loss = MGDLoss(channels=2, masked=0.5, alpha=0.1)
    with torch.no_grad():
        for layer in (loss.generation[0], loss.generation[2]):
            layer.bias.zero_()
            layer.weight.zero_()
            for channel in range(2):
                layer.weight[channel, channel, 1, 1] = 1.0
    student = torch.full((2, 2, 4, 4), 3.0, requires_grad=True)
    teacher = torch.full((2, 2, 4, 4), 5.0)
    twin = copy.deepcopy(loss)
    kept = int(twin.mask(student).sum()) * 2
    assert 0 < kept < student.numel()
    result = call(loss, student, teacher)
    assert result.raw["generation"].item() == pytest.approx((kept * 4 + (student.numel() - kept) * 25) / 2)
    assert result.loss.item() == pytest.approx(0.1 * result.raw["generation"].item())
    result.loss.backward()
    assert int((student.grad != 0).sum()) == kept, "a blanked cell teaches nothing"


def test_generation_draws_masks_of_its_own():
    loss, feature = MGDLoss(channels=2, masked=0.65), torch.zeros(4, 2, 50, 50)
    state = torch.get_rng_state()
    one, other = loss.mask(feature), loss.mask(feature)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(one, other)
    assert float(one.float().mean()) == pytest.approx(0.35, abs=0.02)
    assert MGDLoss(channels=2, masked=0.0).mask(feature).all()


@pytest.mark.parametrize("name", ["cwd", "pkd", "mgd"])
def test_trains_student_and_block_and_not_the_teacher(name):
    torch.manual_seed(0)
    student, teacher = trained(TinyDetector((8, 12, 16))), trained(TinyDetector((8, 16, 24)), seed=1)
    distiller = Distiller(student, teacher=teacher, config={"loss": {"name": name}, "balance": {"mode": "fixed"}})
    images, boxes = batch()
    student(images)
    result = distiller(images, boxes)
    assert result.loss > 0
    result.loss.backward()
    assert student.stem[0].weight.grad.any()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in distiller.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    pickle.dumps(distiller.training_state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["cwd", "pkd", "mgd"])
def test_half_precision_features(name, dtype):
    generator = torch.Generator().manual_seed(0)
    student = (torch.rand(2, 4, 3, 3, generator=generator) * 6e4).to(dtype).requires_grad_()
    result = call(create_loss(name, channels=4), student, (torch.rand(2, 4, 3, 3, generator=generator)).to(dtype))
    assert result.loss.dtype == torch.float32
    assert result.loss.isfinite()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cwd", {"temperature": 0.0}, "temperature"),
        ("cwd", {"alpha": -1.0}, "alpha"),
        ("pkd", {"alpha": math.nan}, "alpha"),
        ("mgd", {"channels": 4, "masked": 1.0}, "masked"),
        ("mgd", {"channels": 4, "alpha": math.inf}, "alpha"),
    ],
)
def test_wrong_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_loss(name, **options)


@pytest.mark.parametrize("name", ["cwd", "pkd", "mgd"])
def test_features_that_do_not_fit(name):
    with pytest.raises(ValueError, match="built for 4 channels"):
        call(create_loss(name, channels=4), torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2))


def test_scored_by_hand():
    """Two images of two cells and two channels; the largest class probability of each cell is its weight."""
    logits = torch.tensor([[[0.0, -5.0], [-1.0, 0.0]], [[math.log(3.0), -9.0], [0.0, -9.0]]]).view(2, 2, 1, 2)
    sure = [0.5, 0.5, 0.75, 1 / (1 + math.exp(9))]
    student = torch.zeros(2, 2, 1, 2, requires_grad=True)
    teacher = torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[0.0, 10.0], [2.0, 0.0]]]).view(2, 2, 1, 2)
    energy = [(1 + 9) / 2, 4 / 2, 4 / 2, 100 / 2]
    result = ScoredLoss(alpha=3.0)(student, teacher, NO_BOXES, CANVAS, scores=logits)
    expected = sum(p * e for p, e in zip(sure, energy, strict=True)) / sum(sure)
    assert float(result.raw["scored"].detach()) == pytest.approx(expected)
    assert float(result.loss.detach()) == pytest.approx(3 * expected)
    result.loss.backward()
    # d/ds of (t - s)^2 / 2 channels at s = 0 is -t, times the cell's share of the weights
    assert float(student.grad[1, 1, 0, 0]) == pytest.approx(-3 * 2 * 0.75 / sum(sure))


@pytest.mark.parametrize("scores", [None, torch.zeros(2, 3, 4, 4)])
def test_scored_refuses_scores_of_another_shape(scores):
    feature = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"class scores have the shape .*N, H, W = \(2, 4, 5\)"):
        ScoredLoss()(feature, feature, NO_BOXES, CANVAS, scores=scores)
