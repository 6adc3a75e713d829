"""Which student learns from which teacher: every pair of model families is distilled for 20 steps.

    python -m benchmarks.compatibility                 # all pairs that are not in the results yet, then the page
    python -m benchmarks.compatibility --page          # the page alone, from the results
    python -m benchmarks.compatibility --again --only yolo26n.yaml timm:resnet18

For each pair, student and teacher are built with random weights (batch normalisations get statistics first), and the
student learns from the distillation alone on one fixed batch. A pair works if its levels pair, a gradient reaches every
tapped map of the student and none the teacher, the loss falls, and afterwards both models have the hooks and modes they
had before. results/benchmarks/compatibility.json holds each pair's figures, docs/pairs.md the matrix.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from benchmarks.common import RESULTS, machine
from fgd_hooks import Distiller
from fgd_hooks.errors import PairingError
from fgd_hooks.integrations.load_model import NamedModel, load_model
from fgd_hooks.utils.files import write_json

FILE = RESULTS / "compatibility.json"
PAGE = Path(__file__).parent.parent / "docs" / "pairs.md"
SIZE, BATCH, STEPS = 128, 2, 20
FALLS = 0.98  # the loss of the last step against that of the first

FAMILIES = (
    "yolov3-tiny.yaml",
    "yolov5n.yaml",
    "yolov8n.yaml",
    "yolov8n-p2.yaml",
    "yolov8n-p6.yaml",
    "yolov9t.yaml",
    "yolov10n.yaml",
    "yolo11n.yaml",
    "yolo12n.yaml",
    "yolo26n.yaml",
    "yolov8s-world.yaml",
    "yolov8n-rtdetr.yaml",
    "benchmarks.compatibility:retinanet",
    "benchmarks.compatibility:fcos",
    "benchmarks.compatibility:mask_rcnn",
    "torchvision:fasterrcnn_mobilenet_v3_large_fpn",
    "benchmarks.compatibility:ssdlite",
    "timm:resnet18",
    "timm:convnext_atto",
    "benchmarks.compatibility:swin",
    "benchmarks.compatibility:vit",
    "benchmarks.compatibility:rt_detr",
)


def retinanet() -> nn.Module:
    """torchvision's RetinaNet on a ResNet-18 with FPN, P3 to P7."""
    return detection.RetinaNet(resnet18_fpn([2, 3, 4], LastLevelP6P7(256, 256)), 4)


def fcos() -> nn.Module:
    """torchvision's FCOS on a ResNet-18 with FPN, P3 to P7."""
    return detection.FCOS(resnet18_fpn([2, 3, 4], LastLevelP6P7(256, 256)), 4)


def mask_rcnn() -> nn.Module:
    """torchvision's Mask R-CNN on a ResNet-18 with FPN, P2 to P5."""
    return detection.MaskRCNN(resnet18_fpn([1, 2, 3, 4], None), 4)


def ssdlite() -> nn.Module:
    """torchvision's SSDlite on MobileNetV3, for images of SIZE pixels instead of 320."""
    model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    half = [0.5] * 3
    model.transform = GeneralizedRCNNTransform(SIZE, SIZE, half, half, size_divisible=1, fixed_size=(SIZE, SIZE))
    return model


def resnet18_fpn(layers: list[int], last: nn.Module | None) -> nn.Module:
    """ResNet-18 with a pyramid of 256 channels."""
    return resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, returned_layers=layers, extra_blocks=last, trainable_layers=5
    )


def swin() -> nn.Module:
    """A small Swin transformer of timm for images of SIZE pixels, as it gives features."""
    import timm

    small = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4), "window_size": 4}
    name = "swin_tiny_patch4_window7_224"
    model: nn.Module = timm.create_model(name, pretrained=False, features_only=True, img_size=SIZE, **small)
    return model


def vit() -> nn.Module:
    """A plain vision transformer of timm: one level of tokens, at the stride of its patches."""
    import timm

    model: nn.Module = timm.create_model("vit_tiny_patch16_224", pretrained=False, dynamic_img_size=True)
    return model


def rt_detr() -> nn.Module:
    """A small RT-DETR of transformers with random weights."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    body = RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], layer_type="basic", out_features=STAGES
    )
    config = RTDetrConfig(
        backbone_config=body,
        encoder_in_channels=[32, 48, 64],
        d_model=32,
        encoder_hidden_dim=32,
        decoder_in_channels=[32, 32, 32],
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        decoder_layers=2,
        num_queries=20,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
    )
    return RTDetrForObjectDetection(config)


STAGES = ["stage2", "stage3", "stage4"]


def family(name: str, seed: int) -> NamedModel | str:
    """A model of the family with natural statistics, or why there is none."""
    torch.manual_seed(seed)
    try:
        model = load_model(name, SIZE)
        module = model.module.train()
        with torch.no_grad():
            for _ in range(3):
                module(torch.rand(BATCH, *model.example.shape[1:]))
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return model


def hooks(model: nn.Module) -> list[int]:
    """How many hooks each module has."""
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]


def batch(shape: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Images (BATCH, C, h, w) and three boxes for each, in pixels."""
    generator = torch.Generator().manual_seed(7)
    images = torch.rand(BATCH, *shape, generator=generator)
    corners = torch.rand(BATCH, 3, 2, 2, generator=generator).sort(dim=2).values
    return images, list((corners * torch.tensor([shape[2], shape[1]])).flatten(2))


def distil(student: NamedModel, teacher: NamedModel) -> dict[str, Any]:
    """Distil one pair for STEPS steps; ``result`` is "works", "apart" (no common level) or what failed."""
    size = teacher.example.shape if teacher.fixed else student.example.shape
    if student.fixed and size != student.example.shape:
        return {"result": "sizes", "why": "each takes images of one size only, and the sizes differ"}
    torch.manual_seed(0)
    pupil, master = copy.deepcopy(student.module).train(), copy.deepcopy(teacher.module)
    before = hooks(pupil), hooks(master), [m.training for m in master.modules()]
    images, boxes = batch(size[1:])
    config = {
        "balance": {"mode": "fixed"},
        "schedule": {"stop": None},
        "student_taps": student.taps,
        "teacher_taps": teacher.taps,
        "resize": True,
    }
    try:
        distiller = Distiller(pupil, teacher=master, config=config, example=images[:1])
    except PairingError as error:
        return {"result": "apart", "why": str(error).splitlines()[0]}
    # the weights of the preset make small gradients, which must not drown in the optimizer's eps
    parameters = [*pupil.parameters(), *distiller.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, eps=1e-20)
    losses, reached = [], [False] * len(distiller.pairs)
    for step in range(STEPS):
        optimizer.zero_grad()
        pupil(images)
        features = distiller.taps.captured
        if step == 0:
            for feature in features:
                feature.retain_grad()  # type: ignore[union-attr]
        loss = distiller(images, boxes).loss
        loss.backward()
        if step == 0:
            reached = [f is not None and f.grad is not None and bool(f.grad.abs().sum() > 0) for f in features]
        optimizer.step()
        losses.append(float(loss.detach()))
    learned = sum(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in pupil.parameters())
    taken = [n for n, p in master.named_parameters() if p.grad is not None]
    levels = {pair.name: [pair.student.channels, pair.teacher.channels] for pair in distiller.pairs}
    distiller.detach()
    left = (hooks(pupil), hooks(master), [m.training for m in master.modules()]) != before
    troubles = {
        "a tapped map gets no gradient": not all(reached),
        "no parameter of the student gets a gradient": learned == 0,
        "the teacher gets a gradient": bool(taken),
        "the loss does not fall": not losses[-1] < FALLS * losses[0],
        "hooks or modes are left behind": left,
    }
    found = [trouble for trouble, there in troubles.items() if there]
    return {
        "result": "fails" if found else "works",
        "why": "; ".join(found),
        "levels": levels,
        "first": losses[0],
        "last": losses[-1],
        "learned_tensors": learned,
    }


def run(students: Sequence[str], teachers: Sequence[str], results: dict[str, Any], again: bool) -> None:
    """Distil the pairs that are not in the results yet, and write these after each row."""
    built: dict[tuple[str, int], NamedModel | str] = {}
    pairs = results.setdefault("pairs", {})
    for student in students:
        for teacher in teachers:
            key = f"{student} <- {teacher}"
            if key in pairs and not again:
                continue
            models = []
            for name, seed in ((student, 0), (teacher, 1)):
                if (name, seed) not in built:
                    built[name, seed] = family(name, seed)
                models.append(built[name, seed])
            start = time.perf_counter()
            missing = [f"{name}: {m}" for name, m in zip((student, teacher), models, strict=True) if isinstance(m, str)]
            try:
                pairs[key] = {"result": "missing", "why": missing[0]} if missing else distil(*models)  # type: ignore[arg-type]
            except Exception as error:
                pairs[key] = {"result": "fails", "why": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            print(
                f"{key}: {pairs[key]['result']} {pairs[key]['why']} ({time.perf_counter() - start:.1f} s)", flush=True
            )
        results["machine"] = {k: v for k, v in machine().items() if k != "load"}
        write_json(FILE, results)


def page(results: dict[str, Any]) -> str:
    """docs/pairs.md."""
    pairs = results["pairs"]
    names = [name for name in FAMILIES if f"{name} <- {name}" in pairs]
    counts = {kind: sum(p["result"] == kind for p in pairs.values()) for kind in ("works", "apart", "sizes", "fails")}
    version = ", ".join(f"{key} {results['machine'][key]}" for key in ("torch", "torchvision", "ultralytics"))
    lines = [
        "# Which student learns from which teacher",
        "",
        "Rows are students, columns teachers, both in the order of the list. A number is how many levels pair; a dash",
        "means that the two have no level of a common stride, which is refused with both pyramids in the message; `=`",
        "that both take images of one size only, and the sizes differ.",
        "",
        f"Every cell ran: {STEPS} steps on a fixed batch of {BATCH} images, from random weights, the student learning",
        "from the distillation alone. A number stands only where a gradient reached each tapped map of the student and",
        "none the teacher, the loss fell, and afterwards the hooks and modes of both models were those of before. Made",
        f"by `python -m benchmarks.compatibility` ({version}, CPU); figures of each pair are in",
        "`results/benchmarks/compatibility.json`.",
        "",
        f"{counts['works']} pairs work, {counts['apart']} have no common level, {counts['sizes']} cannot share an",
        f"image, {counts['fails']} fail.",
        "",
        "| | student | " + " | ".join(str(number) for number in range(1, len(names) + 1)) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    signs = {"apart": "-", "sizes": "=", "fails": "fails", "missing": "?"}
    for number, student in enumerate(names, start=1):
        cells = []
        for teacher in names:
            pair = pairs.get(f"{student} <- {teacher}", {"result": "missing"})
            cells.append(str(len(pair["levels"])) if pair["result"] == "works" else signs[pair["result"]])
        lines.append(
            f"| {number} | `{student.removeprefix('benchmarks.compatibility:')}` | " + " | ".join(cells) + " |"
        )
    lines += [
        "",
        "`retinanet`, `fcos` and `mask_rcnn` are torchvision's on a ResNet-18 with FPN; `ssdlite` is its SSDlite and",
        f"`swin` a small Swin of timm, both for images of {SIZE} pixels; `vit` is timm's `vit_tiny_patch16_224` with",
        "`dynamic_img_size`, `rt_detr` a small RT-DETR of transformers. Models of torchvision are seen from behind",
        "their transform here; in a training use [`TorchvisionDistiller`](torchvision.md), which takes boxes and",
        "padding from the model. More of YOLO, and its other tasks: [families](yolo-families.md); more of timm:",
        "[timm](timm.md).",
        "",
    ]
    failing = {key: pair["why"] for key, pair in pairs.items() if pair["result"] in ("fails", "missing")}
    if failing:
        lines += ["What fails:", "", *(f"- `{key}`: {why}" for key, why in failing.items()), ""]
    return "\n".join(lines)


def main() -> int:
    """Returns the number of pairs that fail."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=FAMILIES, help="families to pair, each with each")
    parser.add_argument("--again", action="store_true", help="also pairs that are in the results")
    parser.add_argument("--page", action="store_true", help="write the page only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(FILE.read_text()) if FILE.exists() else {}
    if not options.page:
        run(options.only, options.only, results, options.again)
    PAGE.write_text(page(results), encoding="utf-8")
    return sum(pair["result"] == "fails" for pair in results["pairs"].values())


if __name__ == "__main__":
    sys.exit(main())
