"""Detectors of transformers, built small and at random: dict-like outputs, batches by keyword, tokens."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("scipy")  # transformers' matching of boxes takes it

from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
)

from fgd_hooks import Distiller

IMAGES = torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))
BOXES = [torch.tensor([[16.0, 16.0, 64.0, 80.0]]), torch.zeros(0, 4)]
LABELS = [
    {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[40 / 128, 48 / 96, 48 / 128, 64 / 96]])},
    {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)},
]


def body(kind, width, stages):
    widths = [width * number for number in (1, 2, 3, 4)]
    settings = {"embedding_size": width, "hidden_sizes": widths, "depths": [1] * 4, "layer_type": "basic"}
    return kind(**settings, out_features=stages)


def rt_detr(width=8, hidden=16):
    torch.manual_seed(width)
    config = RTDetrConfig(
        backbone_config=body(RTDetrResNetConfig, width, ["stage2", "stage3", "stage4"]),
        encoder_in_channels=[2 * width, 3 * width, 4 * width],
        encoder_hidden_dim=hidden,
        decoder_in_channels=[hidden] * 3,
        d_model=hidden,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        decoder_layers=1,
        num_queries=10,
        num_denoising=0,
        num_labels=3,
    )
    return RTDetrForObjectDetection(config)


def detr(width=8, hidden=16):
    torch.manual_seed(width)
    config = DetrConfig(
        use_timm_backbone=False,
        backbone_config=body(ResNetConfig, width, ["stage4"]),
        d_model=hidden,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=10,
        num_labels=3,
    )
    return DetrForObjectDetection(config)


NECK = {"student_taps": ["model.encoder[last_hidden_state]"], "teacher_taps": ["model.encoder[last_hidden_state]"]}


@pytest.mark.parametrize(
    ("build", "config", "levels"),
    [
        (rt_detr, {}, {"P3": 16, "P4": 16, "P5": 16}),  # what feeds the encoder
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
