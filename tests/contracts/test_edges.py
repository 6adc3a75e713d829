"""The edges of the data, through the Distiller, against the definition written down slowly."""

import pytest
import torch

from fgd_hooks import Distiller
from tests.helpers.reference import slow_fgd
from tests.helpers.tiny import TinyDetector, trained

FIXED = {"balance": {"mode": "fixed"}}


def boxes_within(count, width, height, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values.flatten(1)
    return corners * torch.tensor([width, height, width, height])


CASES = {
    "no box in the batch": ((64, 64), [torch.zeros(0, 4), torch.zeros(0, 4)]),
    "no box in one image": ((64, 64), [torch.zeros(0, 4), boxes_within(3, 64, 64)]),
    "one box as big as the image": ((64, 64), [torch.tensor([[0.0, 0, 64, 64]]), boxes_within(2, 64, 64)]),
    "1000 boxes": ((64, 96), [boxes_within(1000, 96, 64), boxes_within(1000, 96, 64, seed=1)]),
    "smaller than the largest stride": ((16, 24), [boxes_within(2, 24, 16), boxes_within(1, 24, 16)]),
    "one pixel": ((1, 1), [boxes_within(1, 1, 1), boxes_within(1, 1, 1)]),
    "a batch of one image": ((64, 64), [boxes_within(4, 64, 64)]),
    "larger than any image before": ((160, 96), [boxes_within(4, 96, 160), boxes_within(5, 96, 160)]),
    "no multiple of a stride": ((50, 71), [boxes_within(4, 71, 50), boxes_within(5, 71, 50)]),
}


@pytest.mark.parametrize("case", CASES)
def test_edges_of_the_data(case):
    (height, width), boxes = CASES[case]
    torch.manual_seed(0)
    student, teacher = trained(TinyDetector((8, 12, 16))), trained(TinyDetector((8, 16, 24)), seed=1)
    student.eval()  # one value per channel is too little for a batch normalisation's statistics
    distiller = Distiller(student, teacher=teacher, config=FIXED)
    images = torch.rand(len(boxes), 3, height, width, generator=torch.Generator().manual_seed(2))
    seen = []
    handle = student.neck.register_forward_hook(lambda module, args, output: seen.extend(output))
    student(images)
    handle.remove()
    result = distiller(images, boxes)
    with torch.no_grad():
        taught = teacher.neck(features_before(teacher, images))
    for (name, loss), feature, target in zip(distiller.losses.items(), seen, taught, strict=True):
        adapted = distiller.adapters[name](feature).double().detach()
        wanted = slow_fgd(loss.double(), adapted, target.double(), boxes, [(height, width)] * len(boxes))
        loss.float()
        for part, value in wanted.items():
            found = result.raw[name][part].double()
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-6, msg=lambda m, at=(name, part): f"{at}: {m}")
    result.loss.backward()
    gradient = student.stem[0].weight.grad
    assert gradient.isfinite().all()
    assert gradient.any()


def features_before(model, images):
    """What the tiny detector's neck receives."""
    features = [model.stem(images)]
    for stage in model.stages:
        features.append(stage(features[-1]))
    return features
