"""Models of the packages that people use, small or with random weights, and the levels that reading their code gives.

Each entry's levels are (stride, channels) of the maps that its head works on, finest first, taken from the package's
source and the configuration here. ``neck`` is the beginning of the names of parameters that must get a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Entry:
    package: str
    name: str
    make: Callable[[], nn.Module]
    levels: tuple[tuple[int, int], ...]
    neck: str
    trains: bool = True

    def __str__(self) -> str:
        return f"{self.package}-{self.name}"


def pyramid(channels: int | tuple[int, ...], *strides: int) -> tuple[tuple[int, int], ...]:
    widths = (channels,) * len(strides) if isinstance(channels, int) else channels
    return tuple(zip(strides, widths, strict=True))


DETR = {"decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
DETR |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}


def detr(kind: str, *stages: int, **settings: Any) -> nn.Module:
    from tests.helpers.transformers_models import detr

    return detr(kind, stages, **DETR, **settings)


def rt_detr(kind: str) -> nn.Module:
    from tests.helpers.transformers_models import rt_detr

    return rt_detr(kind, decoder_layers=2)


def rf_detr() -> nn.Module:
    import transformers as hf

    body = hf.RfDetrDinov2Config(
        image_size=256,
        patch_size=16,
        num_windows=2,
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=3,
        out_features=["stage2", "stage4"],
    )
    return hf.RfDetrForObjectDetection(
        hf.RfDetrConfig(backbone_config=body, d_model=96, num_queries=100, decoder_layers=2)
    )


def mask2former() -> nn.Module:
    import transformers as hf

    body = hf.SwinConfig(
        embed_dim=12, depths=[1] * 4, num_heads=[1, 1, 2, 2], out_features=[f"stage{number}" for number in range(1, 5)]
    )
    widths = dict.fromkeys(
        ("feature_size", "mask_feature_size", "hidden_dim", "dim_feedforward", "encoder_feedforward_dim"), 32
    )
    settings = {"encoder_layers": 1, "decoder_layers": 3, "num_attention_heads": 4}
    return hf.Mask2FormerForUniversalSegmentation(hf.Mask2FormerConfig(backbone_config=body, **widths, **settings))


def hugging(kind: str, suffix: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers as hf

        model: nn.Module = getattr(hf, kind + suffix)(getattr(hf, f"{kind}Config")(**settings))
        return model

    return make


def named(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from fgd_hooks.integrations.load_model import load_model

        return load_model(name, 256).module

    return make


def smp(architecture: str, encoder: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import segmentation_models_pytorch

        model: nn.Module = getattr(segmentation_models_pytorch, architecture)(encoder, encoder_weights=None)
        return model

    return make


def efficientdet() -> nn.Module:
    import effdet

    config = effdet.get_efficientdet_config("tf_efficientdet_d0")
    return effdet.EfficientDet(config, pretrained_backbone=False)


def rfdetr(size: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import rfdetr as package

        model: nn.Module = getattr(package, f"RFDETR{size}")(pretrain_weights=None, device="cpu").model.model
        return model

    return make


def libreyolo() -> nn.Module:
    import libreyolo as package

    model: nn.Module = package.LibreYOLO9(None, size="t", device="cpu").model
    return model


class _Missing(type(nn)):  # type: ignore[misc]
    """Stands for the compiled part of mmcv, which the light build lacks; nothing here calls it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


def mmdet(path: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import sys
        from importlib.machinery import ModuleSpec
        from pathlib import Path

        import mmcv  # noqa: F401

        if "mmcv._ext" not in sys.modules:
            stub = _Missing("mmcv._ext")
            stub.__spec__, stub.__file__ = ModuleSpec("mmcv._ext", None), "missing"
            sys.modules["mmcv._ext"] = stub
        import mmdet.models
        from mmdet.registry import MODELS
        from mmengine.config import Config
        from mmengine.registry import DefaultScope

        config = Config.fromfile(Path(mmdet.__file__).parent / ".mim/configs" / path)
        _without_weights(config.model)
        with DefaultScope.overwrite_default_scope("mmdet"):
            model: nn.Module = MODELS.build(config.model)
        return model

    return make


def _without_weights(config: Any) -> None:
    if isinstance(config, dict):
        config.update({key: None for key in ("init_cfg", "pretrained") if key in config})
        config = list(config.values())
    for each in config if isinstance(config, (list, tuple)) else ():
        _without_weights(each)


ONE = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
ZOO = (
    Entry(
        "transformers",
        "Deformable DETR",
        lambda: detr("DeformableDetr", 2, 3, 4, d_model=32),
        pyramid(32, 8, 16, 32, 64),
        "model.encoder",
    ),
    Entry("transformers", "DETR", lambda: detr("Detr", 4, d_model=32), pyramid(32, 32), "model.encoder"),
    Entry(
        "transformers",
        "Conditional DETR",
        lambda: detr("ConditionalDetr", 4, d_model=32),
        pyramid(32, 32),
        "model.encoder",
    ),
    Entry("transformers", "DAB-DETR", lambda: detr("DabDetr", 4, hidden_size=32), pyramid(32, 32), "model.encoder"),
    *(
        Entry("transformers", name, lambda kind=kind: rt_detr(kind), pyramid(16, 8, 16, 32), "model.encoder")
        for name, kind in (("RT-DETR", "RTDetr"), ("RT-DETRv2", "RTDetrV2"), ("D-FINE", "DFine"))
    ),
    Entry("transformers", "RF-DETR", rf_detr, pyramid(96, 16), "model.backbone"),
    Entry(
        "transformers",
        "LW-DETR",
        hugging("LwDetr", "ForObjectDetection", projector_scale_factors=[1.0]),
        pyramid(256, 16),
        "model.backbone.projector",
    ),
    Entry(
        "transformers",
        "LW-DETR of two scales",
        hugging("LwDetr", "ForObjectDetection", projector_scale_factors=[2.0, 0.5]),
        pyramid(256, 8, 32),
        "model.backbone.projector",
    ),
    Entry(
        "transformers",
        "Table Transformer",
        lambda: detr("TableTransformer", 4, d_model=32),
        pyramid(32, 32),
        "model.enc",
    ),
    Entry(
        "transformers",
        "Mask2Former",
        mask2former,
        pyramid(32, 4, 8, 16, 32),  # the mask features, and the three maps that the decoder's layers look at in turn
        "model.pixel_level_module.decoder",
    ),
    Entry(
        "transformers",
        "YOLOS",
        hugging("Yolos", "ForObjectDetection", **ONE, intermediate_size=64, image_size=[256, 384]),
        pyramid(48, 16),
        "vit.encoder",
    ),
    Entry(
        "transformers",
        "SegFormer",
        hugging("Segformer", "ForSemanticSegmentation"),
        pyramid((32, 64, 160, 256), 4, 8, 16, 32),
        "segformer",
    ),
    Entry(
        "transformers",
        "DPT",
        hugging(
            "DPT",
            "ForDepthEstimation",
            **{**ONE, "num_hidden_layers": 12},
            intermediate_size=96,
            image_size=256,
            neck_hidden_sizes=[8, 16, 32, 32],
            fusion_hidden_size=32,
        ),
        pyramid(32, 2),  # head_in_index is -1: the head takes the last of the four fused maps alone
        "neck",
    ),
    Entry(
        "transformers",
        "Swin backbone",
        hugging("Swin", "Backbone", out_features=["stage2", "stage3"]),
        pyramid((192, 384), 8, 16),
        "",
    ),
    Entry("transformers", "VitDet backbone", hugging("VitDet", "Backbone", **ONE), pyramid(48, 16), ""),
    Entry("transformers", "DINOv2 backbone", hugging("Dinov2", "Backbone", **ONE), pyramid(48, 14), ""),
    Entry(
        "torchvision",
        "RetinaNet",
        named("torchvision:retinanet_resnet50_fpn"),
        pyramid(256, 8, 16, 32, 64, 128),
        "backbone.fpn",
    ),
    Entry(
        "torchvision",
        "Faster R-CNN MobileNet",
        named("torchvision:fasterrcnn_mobilenet_v3_large_fpn"),
        pyramid(256, 32, 32, 64),  # two layers of stride 32, and LastLevelMaxPool
        "backbone.fpn",
    ),
    Entry(
        "torchvision", "FCOS", named("torchvision:fcos_resnet50_fpn"), pyramid(256, 8, 16, 32, 64, 128), "backbone.fpn"
    ),
    Entry(
        "torchvision",
        "Mask R-CNN",
        named("torchvision:maskrcnn_resnet50_fpn"),
        pyramid(256, 4, 8, 16, 32, 64),
        "backbone.fpn",
    ),
    Entry(
        "timm",
        "efficientnet_b0",
        named("timm:efficientnet_b0"),
        pyramid((16, 24, 40, 112, 320), 2, 4, 8, 16, 32),
        "",
    ),
    Entry("timm", "resnet18", named("timm:resnet18"), pyramid((64, 64, 128, 256, 512), 2, 4, 8, 16, 32), ""),
    Entry("timm", "convnext_atto", named("timm:convnext_atto"), pyramid((40, 80, 160, 320), 4, 8, 16, 32), ""),
    Entry("ultralytics", "yolo11n", named("yolo11n.yaml"), pyramid((64, 128, 256), 8, 16, 32), "model.22"),
    Entry("ultralytics", "yolo26n", named("yolo26n.yaml"), pyramid((64, 128, 256), 8, 16, 32), "model.22"),
    Entry("ultralytics", "yolov8n-p6", named("yolov8n-p6.yaml"), pyramid((64, 128, 192, 256), 8, 16, 32, 64), "model"),
    Entry("effdet", "EfficientDet-D0", efficientdet, pyramid(64, 8, 16, 32, 64, 128), "fpn"),
    Entry("segmentation_models_pytorch", "FPN resnet18", smp("FPN", "resnet18"), pyramid(256, 4, 8, 16, 32), "decoder"),
    Entry(
        "segmentation_models_pytorch",
        "Unet resnet18",
        smp("Unet", "resnet18"),
        pyramid((64, 64, 128, 256, 512), 2, 4, 8, 16, 32),
        "encoder",
    ),
    Entry(
        "segmentation_models_pytorch",
        "Unet mit_b0",
        smp("Unet", "mit_b0"),
        pyramid((32, 64, 160, 256), 4, 8, 16, 32),
        "encoder",
    ),
    *(
        Entry("rfdetr", size, rfdetr(size), pyramid(256, 16), "backbone.0.projector")
        for size in ("Nano", "Small", "Medium", "Large")
    ),
    Entry("libreyolo", "YOLO9-t", libreyolo, pyramid((64, 96, 128), 8, 16, 32), "neck"),
    *(
        Entry("mmdet", name, mmdet(path), levels, "neck")
        for name, path, levels in (
            ("RetinaNet R18", "retinanet/retinanet_r18_fpn_1x_coco.py", pyramid(256, 8, 16, 32, 64, 128)),
            ("FCOS R50", "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py", pyramid(256, 8, 16, 32, 64, 128)),
            ("ATSS R50", "atss/atss_r50_fpn_1x_coco.py", pyramid(256, 8, 16, 32, 64, 128)),
            ("YOLOX-tiny", "yolox/yolox_tiny_8xb8-300e_coco.py", pyramid(96, 8, 16, 32)),
            ("RTMDet-tiny", "rtmdet/rtmdet_tiny_8xb32-300e_coco.py", pyramid(96, 8, 16, 32)),
            ("YOLOv3 D53", "yolo/yolov3_d53_8xb8-320-273e_coco.py", pyramid((128, 256, 512), 8, 16, 32)),
            ("YOLOF R50", "yolof/yolof_r50-c5_8xb8-1x_coco.py", pyramid(512, 32)),
        )
    ),
)
