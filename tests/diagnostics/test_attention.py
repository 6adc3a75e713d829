import dataclasses
import math

import pytest
import torch
from torch import nn

from fgd_hooks import Distiller
from fgd_hooks.diagnostics.attention import LevelSheet, attention_distances, attention_sheets
from tests.helpers.tiny import TinyDetector, batch, trained


def make(config=None, widths=(12, 16, 20)):
    student, teacher = trained(TinyDetector()), trained(TinyDetector(widths), seed=1)
    return student, teacher, Distiller(student, teacher=teacher, config=config)


def features(model, images):
    """The neck's maps, taken by hand."""
    kept = []
    handle = model.head.register_forward_pre_hook(lambda module, args: kept.extend(args[0]))
    model.eval()
    with torch.no_grad():
        model(images)
    handle.remove()
    return kept


def attention(feature, temperature):
    """H * W * softmax over the cells of mean_c |F| / T, cell by cell."""
    _, height, width = feature.shape
    powers = [
        [math.exp(float(feature[:, y, x].abs().mean()) / temperature) for x in range(width)] for y in range(height)
    ]
    total = sum(map(sum, powers))
    return torch.tensor([[height * width * power / total for power in row] for row in powers])


def test_a_sheet_holds_what_the_definition_says():
    student, teacher, distiller = make({"loss": {"options": {"temperature": 0.8}}})
    images, boxes = batch()
    sheets = attention_sheets(distiller, student, images, boxes, names=["a", "b"])
    assert [(s.name, s.level) for s in sheets] == [(n, p) for n in "ab" for p in ("P3", "P4", "P5")]
    sheet = sheets[4]  # the second image's P4
    assert sheet.stride == 16
    assert sheet.temperature == 0.8
    assert torch.equal(sheet.image, images[1])
    assert torch.equal(sheet.boxes, boxes[1])
    own = distiller.adapters["P4"](features(student, images)[1])[1].detach()
    taught = features(teacher, images)[1][1]
    torch.testing.assert_close(sheet.teacher_spatial, attention(taught, 0.8))
    torch.testing.assert_close(sheet.student_spatial, attention(own, 0.8))
    for found, feature in ((sheet.teacher_channels, taught), (sheet.student_channels, own)):
        power = (feature.abs().mean((1, 2)) / 0.8).exp()
        torch.testing.assert_close(found, 16 * power / power.sum())
    expected = (attention(own, 0.8) - attention(taught, 0.8)).abs().sum() / 16
    assert sheet.distance == pytest.approx(float(expected), rel=1e-4)


def test_masks_of_one_box():
    """A box of 10..30 x 18..30 pixels covers the cells 1..4 x 2..4 at stride 8."""
    student, _, distiller = make()
    sheet = attention_sheets(distiller, student, batch(count=1)[0], [torch.tensor([[10.0, 18, 30, 30]])])[0]
    foreground = torch.zeros(8, 8)
    foreground[2:5, 1:5] = 1 / 12
    torch.testing.assert_close(sheet.foreground, foreground)
    torch.testing.assert_close(sheet.background, (foreground == 0) / 52)


def test_without_trained_adapters_the_students_own_attention():
    student, _, distiller = make()
    images, boxes = batch()
    for sheet, feature in zip(
        attention_sheets(distiller, student, images, boxes, adapted=False)[:3], features(student, images), strict=True
    ):
        assert not sheet.adapted
        assert sheet.student_channels is None
        torch.testing.assert_close(sheet.student_spatial, attention(feature[0], 0.5))


def test_an_adapter_without_parameters_needs_no_training():
    student, _, distiller = make(widths=(8, 16, 20))
    sheets = attention_sheets(distiller, student, *batch(count=1), adapted=False)
    assert [sheet.adapted for sheet in sheets] == [True, False, False]


def test_a_loss_without_temperature_and_levels_of_choice():
    student, _, distiller = make({"loss": {"name": "imitation"}, "levels": ["P5"]})
    (sheet,) = attention_sheets(distiller, student, *batch(count=1))
    assert (sheet.level, sheet.temperature) == ("P5", 0.5)


def state(*modules):
    return [
        (
            {key: value.clone() for key, value in module.state_dict().items()},
            [each.training for each in module.modules()],
            [parameter.grad for parameter in module.parameters()],
            sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in module.modules()),
        )
        for module in modules
    ]


def test_nothing_is_changed():
    student, teacher, distiller = make({"adapter": "conv1x1_bn"})
    student.stem.append(nn.Dropout(0.5))  # draws random numbers unless it is in eval mode
    student.train()
    student.stages[0].eval()  # a mixture of modes
    distiller.train()
    teacher.eval()  # the Distiller keeps it there
    images, boxes = batch()
    before, generator = state(student, teacher, distiller), torch.get_rng_state()
    attention_sheets(distiller, student, images, boxes)
    after = state(student, teacher, distiller)
    for (weights, *rest), (new_weights, *new_rest) in zip(before, after, strict=True):
        assert rest == new_rest
        assert all(torch.equal(value, new_weights[key]) for key, value in weights.items())
    assert torch.equal(generator, torch.get_rng_state())


def test_between_the_students_forward_pass_and_the_loss():
    """A look at other images does not disturb the features that a training step has captured."""
    losses = []
    for look in (False, True):
        torch.manual_seed(0)
        student, _, distiller = make({"balance": {"mode": "fixed"}})
        images, boxes = batch()
        student.train()
        student(images)
        if look:
            attention_sheets(distiller, student, *batch(seed=5, count=1))
        losses.append(distiller(images, boxes).loss.item())
    assert losses[0] == losses[1] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [torch.zeros(3, 64, 64)]}, "list"),
        ({"boxes": [torch.zeros(0, 4)]}, "2 images, 2 names and boxes for 1"),
        ({"names": ["one"]}, "1 names"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    student, _, distiller = make()
    images, boxes = batch()
    with pytest.raises(ValueError, match=message):
        attention_sheets(distiller, student, **{"images": images, "boxes": boxes, **change})


def hand_made(level="P3", shift=0.5):
    """Attentions of mean 1 that differ by ``shift`` in each of the four cells."""
    teacher = torch.ones(2, 2)
    return LevelSheet(
        name="a cell / b",
        level=level,
        stride=8,
        temperature=0.5,
        image=torch.rand(3, 16, 16),
        boxes=torch.tensor([[1.0, 1, 7, 7], [9.0, 9, 15, 15]]),
        foreground=torch.tensor([[0.25, 0.25], [0, 0]]),
        background=torch.tensor([[0, 0], [0.5, 0.5]]),
        teacher_spatial=teacher,
        student_spatial=teacher + torch.tensor([[shift, -shift], [shift, -shift]]),
        teacher_channels=torch.tensor([0.5, 2.0, 0.25, 1.25]),
        student_channels=torch.tensor([1.0, 1.5, 0.5, 1.0]),
        adapted=True,
    )


def test_distance_is_the_mean_over_cells_and_images():
    sheets = [hand_made("P3", 0.5), hand_made("P4", 0.25), hand_made("P3", 0.75)]
    assert sheets[0].distance == pytest.approx(0.5)
    assert float(sheets[0].difference.sum()) == 0
    assert attention_distances(sheets) == pytest.approx({"P3": 0.625, "P4": 0.25})
    assert dataclasses.replace(sheets[0], student_spatial=torch.ones(2, 2)).distance == 0
