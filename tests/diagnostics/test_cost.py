import copy

import torch

from fgd_hooks import Distiller
from fgd_hooks.diagnostics.cost import extra_cost
from tests.helpers.tiny import TinyDetector, batch, trained

# Multiplications and additions of the teacher's convolutions up to its neck, for 64 x 64 pixels:
# (input channels, output channels, kernel, cells of the output)
TEACHER = [(3, 8, 3, 64), (8, 16, 3, 16), (16, 24, 3, 4)]  # stem and stages
TEACHER += [(8, 8, 3, 64), (16, 16, 3, 16), (24, 24, 3, 4), (8, 16, 3, 16), (16, 24, 3, 4)]  # neck


def convolution(inputs, outputs, kernel, cells):
    return 2 * inputs * outputs * kernel**2 * cells


def test_counts_by_hand():
    torch.manual_seed(0)
    student, teacher = trained(TinyDetector((8, 12, 16))), trained(TinyDetector((8, 16, 24)))
    distiller = Distiller(student, teacher=teacher, config={"loss": {"name": "imitation"}})
    cost = extra_cost(distiller, 5, 64)
    assert cost.teacher_flops == 5 * sum(convolution(*layer) for layer in TEACHER)
    # fitted (1x1) at P4 and P5: forward, gradient of the weights, gradient of the feature
    assert cost.own_flops == 5 * 3 * (convolution(12, 16, 1, 16) + convolution(16, 24, 1, 4))
    assert cost.parameters == 12 * 16 + 16 + 16 * 24 + 24
    assert cost.feature_bytes == 5 * 2 * 4 * (8 * 64 + 16 * 16 + 24 * 4)
    weights = sum(t.numel() * t.element_size() for t in teacher.state_dict().values())
    assert cost.weight_bytes == weights + 16 * cost.parameters


def test_the_line_names_what_matters():
    student = trained(TinyDetector((8, 12, 16)))
    line = str(extra_cost(Distiller(student, teacher=trained(TinyDetector((8, 16, 24)))), 4, 64))
    assert "\n" not in line
    for part in ("TinyDetector", "P3 8->8 channels (identity)", "P5 24->16 channels (fitted)", "4 images of 64x64"):
        assert part in line
    for unit in ("parameters", "GFLOPs", "MB"):
        assert unit in line


def test_leaves_no_trace():
    student, teacher = trained(TinyDetector((8, 12, 16))), trained(TinyDetector((8, 16, 24)))
    distiller = Distiller(student, teacher=teacher, config={"adapter": "conv1x1_bn"})
    images, boxes = batch()
    student(images)["scores"].sum().backward()
    distiller(images, boxes).loss.backward()
    models = (student, teacher, distiller)
    before = copy.deepcopy([model.state_dict() for model in models])
    gradients = [p.grad for model in models for p in model.parameters()]
    drawn = torch.get_rng_state()
    extra_cost(distiller, 1, 64)
    assert torch.equal(drawn, torch.get_rng_state())
    for one, model in zip(before, models, strict=True):
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in one.items())
    after = [p.grad for model in models for p in model.parameters()]
    assert all(a is b for a, b in zip(gradients, after, strict=True))
