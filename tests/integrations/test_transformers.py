"""Detectors of transformers, built small and at random: dict-like outputs, batches by keyword, tokens."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("scipy")  # transformers' matching of boxes takes it

from fgd_hooks import Distiller
from tests.helpers import transformers_models as models

IMAGES = torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))
BOXES = [torch.tensor([[16.0, 16.0, 64.0, 80.0]]), torch.zeros(0, 4)]
LABELS = [
    {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[40 / 128, 48 / 96, 48 / 128, 64 / 96]])},
    {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)},
]


def rt_detr(width=8, hidden=16):
    return models.rt_detr(width=width, hidden=hidden, num_denoising=0, num_labels=3)


def detr(width=8, hidden=16):
    sizes = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 10, "num_labels": 3, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return models.detr(width=width, d_model=hidden, use_timm_backbone=False, **sizes, **heads)


NECK = {"student_taps": ["model.encoder[last_hidden_state]"], "teacher_taps": ["model.encoder[last_hidden_state]"]}


@pytest.mark.parametrize(
    ("build", "config", "levels"),
    [
        (rt_detr, {}, {"P3": 16, "P4": 16, "P5": 16}),  # what the encoder returns
        (rt_detr, NECK, {"P3": 16, "P4": 16, "P5": 16}),  # what it returns: a list inside a dict
        (detr, NECK, {"P5": 16}),  # tokens inside a dict
    ],
)
def test_a_detector_learns_from_its_like(build, config, levels):
    student, teacher = build(), build(12, 24)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-4)
    with Distiller(student, teacher=teacher, config=config) as distiller:
        assert {pair.name: pair.student.channels for pair in distiller.pairs} == levels
        assert {pair.teacher.channels for pair in distiller.pairs} == {24}
        assert [tuple(each.shape[2:]) for each in distiller.teacher_features(IMAGES)] == [
            (96 // pair.student.stride, 128 // pair.student.stride) for pair in distiller.pairs
        ]
        optimizer.add_param_group({"params": distiller.parameters()})
        for _ in range(3):
            task = student(pixel_values=IMAGES, labels=LABELS).loss
            distilled = distiller(IMAGES, BOXES)
            optimizer.zero_grad()
            (task + distilled.loss).backward()
            optimizer.step()
        assert distiller.balance.unmeasured == []
        assert distilled.loss.item() > 0


@pytest.mark.parametrize("config", [{}, NECK])
def test_the_taps_change_nothing_of_the_output(config):
    student = detr() if config else rt_detr()
    plain = student.eval()(pixel_values=IMAGES)
    with Distiller(student, teacher=type(student)(student.config), config=config):
        tapped = student(pixel_values=IMAGES)
    assert type(tapped) is type(plain)
    assert torch.equal(tapped.logits, plain.logits)
    assert torch.equal(tapped.pred_boxes, plain.pred_boxes)
