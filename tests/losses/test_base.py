"""The template that all losses share, by a loss of one's own."""

import pytest
import torch

from fgd_hooks.losses.base import LOSSES, FeatureLoss, create_loss, list_losses, register_loss
from fgd_hooks.masks import PackedBoxes

CANVAS = (20, 20)
BOXES = [torch.tensor([[1.0, 11.0, 9.0, 19.0]]), torch.zeros(0, 4)]  # one cell and, as far as it is seen, half a column


@pytest.fixture
def own():
    """Mean distance over all cells, and over those inside a box; with what its terms were given."""

    @register_loss("test_own")
    class Own(FeatureLoss):
        part_names = ("whole", "inside")

        def __init__(self, channels, alpha=1.0, beta=2.0):
            super().__init__(channels, alpha=alpha, beta=beta)

        def terms(self, student, teacher, targets):
            self.seen = student, teacher, torch.is_autocast_enabled("cpu")
            distance = (student - teacher).abs().mean(1)
            return distance.mean(), distance[targets.masks(student, teacher)[0] > 0].mean()

    yield Own
    del LOSSES._factories["test_own"]


def features(dtype=torch.float32):
    student, teacher = torch.randn(2, 2, 3, 2, 2, generator=torch.Generator().manual_seed(0)).to(dtype).unbind(0)
    return student.clone().requires_grad_(), teacher.clone().requires_grad_()


def test_terms_become_parts_that_are_weighted_and_summed(own):
    assert "test_own" in list_losses()
    loss, (student, teacher) = create_loss("test_own", channels=3, beta=0.5), features()
    assert loss.weights == {"whole": 1.0, "inside": 0.5}
    loss.alpha = 3.0
    distance = (student - teacher).abs().mean(1).detach()
    for boxes, canvas in ((BOXES, CANVAS), (PackedBoxes.from_list(BOXES, CANVAS), None)):
        result = loss(student, teacher, boxes, canvas)
        assert list(result.parts) == list(result.raw) == ["whole", "inside"]
        torch.testing.assert_close(result.raw["whole"].detach(), distance.mean())
        torch.testing.assert_close(result.raw["inside"].detach(), distance[0, 1].mean())
        torch.testing.assert_close(result.parts["whole"], 3 * result.raw["whole"])
        torch.testing.assert_close(result.loss, 3 * result.raw["whole"] + 0.5 * result.raw["inside"])
    result.loss.backward()
    assert student.grad.any()
    assert teacher.grad is None


@pytest.mark.parametrize(("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_terms_get_wide_features_and_no_autocast(own, dtype, wide):
    loss, (student, teacher) = own(3), features(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = loss(student, teacher.float(), BOXES, CANVAS)
    assert [each.dtype for each in loss.seen[:2]] == [wide, wide]
    assert not loss.seen[2]
    assert not loss.seen[1].requires_grad
    assert result.loss.dtype == wide


def test_what_does_not_fit_is_refused(own):
    loss, (student, teacher) = own(3), features()
    for arguments, words in [
        ((student, teacher[:, :2], BOXES, CANVAS), "differ in shape"),
        ((student[:, :2], teacher[:, :2], BOXES, CANVAS), "built for 3 channels"),
        ((student, teacher, BOXES[:1], CANVAS), "hold 2 images, the boxes are those of 1"),
        ((student, teacher, BOXES), "canvas is missing"),
    ]:
        with pytest.raises(ValueError, match=words):
            loss(*arguments)
    with pytest.raises(ValueError, match="beta must be 0 or positive, and finite, found -1"):
        own(3, beta=-1)


@pytest.mark.parametrize("names", [("whole",), ("whole", "inside", "outside"), ()])
def test_each_part_has_one_term_and_one_weight(own, names):
    loss = own(3)
    loss.part_names = names
    with pytest.raises(ValueError, match="Own names the parts .* found 2 and"):
        loss(*features(), BOXES, CANVAS)


@pytest.mark.parametrize("name", ["fgd", "imitation", "cwd", "pkd", "mgd", "scored"])
def test_a_batch_without_images_is_zero(name):
    loss = create_loss(name, channels=4)
    student, scores = torch.zeros(0, 4, 3, 3, requires_grad=True), torch.zeros(0, 2, 3, 3)
    result = loss(student, torch.zeros(0, 4, 3, 3), [], CANVAS, **({"scores": scores} if name == "scored" else {}))
    assert tuple(result.parts) == tuple(result.raw) == loss.part_names
    assert result.loss.item() == 0
    result.loss.backward()
    assert student.grad.shape == student.shape
