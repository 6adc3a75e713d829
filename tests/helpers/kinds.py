"""Small detectors of every kind of build: how the head takes the levels, and in what they are wrapped."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

WIDTH = 24  # channels of each level of a neck; the backbone's are 8, 12 and 16, predictions have 9


class Pyramid(NamedTuple):
    p3: Tensor
    p4: Tensor
    p5: Tensor


@dataclass
class Features:
    maps: Any
    mask: Any = None


class Backbone(nn.Module):
    """Strides 8, 16 and 32, as a list."""

    def __init__(self) -> None:
        super().__init__()
        steps = ((3, 8, 8), (8, 12, 2), (12, 16, 2))
        self.stages = nn.ModuleList(nn.Conv2d(i, o, 3, k, 1) for i, o, k in steps)

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for stage in self.stages:
            x = stage(x).relu()
            found.append(x)
        return found


class TopDown(nn.Module):
    """A feature pyramid: each level sees the coarser ones."""

    def __init__(self, widths: tuple[int, ...] = (8, 12, 16)) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, WIDTH, 1) for width in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, 1, 1) for _ in widths)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        sides = [lateral(each) for lateral, each in zip(self.lateral, maps, strict=True)]
        for number in range(len(sides) - 1, 0, -1):
            sides[number - 1] = sides[number - 1] + nn.functional.interpolate(
                sides[number], sides[number - 1].shape[2:]
            )
        return [smooth(each) for smooth, each in zip(self.smooth, sides, strict=True)]


class Wrapped(nn.Module):
    """A neck whose result is wrapped by a function."""

    def __init__(self, wrap: Any = list) -> None:
        super().__init__()
        self.inner = TopDown()
        self.wrap = wrap

    def forward(self, maps: list[Tensor]) -> Any:
        return self.wrap(self.inner(maps))


class Towers(nn.Module):
    """A head with a tower for classes and one for boxes, as RetinaNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_tower, self.box_tower = nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.Conv2d(WIDTH, WIDTH, 3, 1, 1)
        self.cls, self.box = nn.Conv2d(WIDTH, 9, 1), nn.Conv2d(WIDTH, 4, 1)

    def single(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls(self.cls_tower(x).relu()), self.box(self.box_tower(x).relu())

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        found = [self.single(each) for each in maps]
        return [cls for cls, _ in found], [box for _, box in found]


class Detector(nn.Module):
    """Backbone, neck and head; subclasses say how the head is called."""

    def __init__(self, wrap: Any = None) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.neck = TopDown() if wrap is None else Wrapped(wrap)
        self.head = Towers()

    def forward(self, images: Tensor) -> Any:
        return self.head(self.neck(self.backbone(images)))


class PerLevel(Detector):
    def __init__(self, wrap: Any = None) -> None:
        super().__init__(wrap)
        self.head = nn.Conv2d(WIDTH, 9, 3, 1, 1)

    def forward(self, images):
        return [self.head(each) for each in self.neck(self.backbone(images))]


class ByMethod(Detector):
    def forward(self, images):
        return [self.head.single(each) for each in self.neck(self.backbone(images))]


class ByMethodOneBranch(Detector):
    """A shared tower and a shared last layer, both called from a loop: the tower belongs to the head."""

    def forward(self, images):
        return [self.head.cls(self.head.cls_tower(each).relu()) for each in self.neck(self.backbone(images))]


class FromModuleList(Detector):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.ModuleList(nn.Sequential(nn.Conv2d(WIDTH, 16, 1), nn.ReLU(), nn.Conv2d(16, 9, 1)) for _ in "345")

    def forward(self, images):
        return [head(each) for head, each in zip(self.head, self.neck(self.backbone(images)), strict=True)]


class StageByStage(Detector):
    """A head called by a method, with a layer of its own for each level before that of the predictions (YOLOv3)."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bridge = nn.ModuleList(nn.Conv2d(WIDTH, 2 * WIDTH, 3, 1, 1) for _ in "345")
            self.predict = nn.ModuleList(nn.Conv2d(2 * WIDTH, 9, 1) for _ in "345")

        def all(self, maps):
            return [last(first(x)) for x, first, last in zip(maps, self.bridge, self.predict, strict=True)]

    def __init__(self) -> None:
        super().__init__()
        self.head = self.Head()

    def forward(self, images):
        return self.head.all(self.neck(self.backbone(images)))


class HeadsOnTheBackbone(Detector):
    """Beside the head on the neck there are others on the backbone's maps, for the training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head_beside = nn.ModuleList(nn.Conv2d(width, 5, 1) for width in (8, 12, 16))

    def forward(self, images):
        maps = self.backbone(images)
        return self.head(self.neck(maps)), [head(each) for head, each in zip(self.head_beside, maps, strict=True)]


class OneFused(nn.Module):
    """A neck that makes one map of all, for two heads of one layer each (CenterNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.neck, self.fuse = Backbone(), TopDown(), nn.Conv2d(WIDTH, WIDTH, 3, 1, 1)
        self.head, self.head_of_sizes = nn.Conv2d(WIDTH, 9, 1), nn.Conv2d(WIDTH, 2, 1)

    def forward(self, images):
        maps = self.neck(self.backbone(images))
        fused = self.fuse(sum(nn.functional.interpolate(each, maps[0].shape[2:]) for each in maps))
        return torch.cat([self.head(fused), self.head_of_sizes(fused)], 1)


class LossInside(Detector):
    """What the head returns goes into a module that has parameters: a loss, or a decoder of boxes."""

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, classes, boxes):
            return sum(each.mean() for each in [*classes, *boxes]) * self.weight

    def __init__(self) -> None:
        super().__init__()
        self.more = self.Loss()

    def forward(self, images):
        return self.more(*self.head(self.neck(self.backbone(images))))


class Record(Detector):
    """Returns everything that it has: the backbone's maps, the neck's, masks of queries and their classes."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.head_of_classes = nn.ModuleList(nn.Conv2d(WIDTH, 20, 1) for _ in "345"), nn.Linear(20, 5)

    def forward(self, images):
        maps = self.backbone(images)
        neck = self.neck(maps)
        masks = [head(each) for head, each in zip(self.head, neck, strict=True)]
        logits = self.head_of_classes(sum(each.mean((2, 3)) for each in masks))
        return {"masks": masks[0], "finest": neck[0], "coarsest": maps[-1], "logits": logits}


class CoarsestFirst(Detector):
    def forward(self, images):
        return self.head(self.neck(self.backbone(images))[::-1])


class ThreeArguments(Detector):
    class Head(Towers):
        def forward(self, p3, p4, p5):
            return super().forward([p3, p4, p5])

    def __init__(self) -> None:
        super().__init__()
        self.head = self.Head()

    def forward(self, images):
        return self.head(*self.neck(self.backbone(images)))


class SecondArgument(Detector):
    """The features come first; a later argument holds a list of positions of the same sizes."""

    class Head(Towers):
        def forward(self, maps, positions):
            return super().forward([each + place for each, place in zip(maps, positions, strict=True)])

    def __init__(self) -> None:
        super().__init__()
        self.head = self.Head()

    def forward(self, images):
        maps = self.neck(self.backbone(images))
        return self.head(maps, [torch.ones_like(each) for each in maps])


class PositionsFirst(SecondArgument):
    """The head's first argument holds no feature maps, but positions that do not come from the images."""

    class Head(Towers):
        def forward(self, positions, maps):
            return super().forward([each + place for each, place in zip(maps, positions, strict=True)])

    def forward(self, images):
        maps = self.neck(self.backbone(images))
        return self.head([torch.ones_like(each) for each in maps], maps)


class SameSize(Detector):
    """Of four levels two have stride 32."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Conv2d(WIDTH, WIDTH, 3, 1, 1)

    def forward(self, images):
        maps = self.neck(self.backbone(images))
        return self.head([*maps, self.more(maps[-1])])


class Inline(nn.Module):
    """No neck module: the model's own forward makes the pyramid, and one head takes level by level."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = Backbone(), Towers()
        self.lateral3, self.lateral4, self.lateral5 = (nn.Conv2d(width, WIDTH, 1) for width in (8, 12, 16))
        self.smooth3, self.smooth4, self.smooth5 = (nn.Conv2d(WIDTH, WIDTH, 3, 1, 1) for _ in range(3))

    def forward(self, images):
        c3, c4, c5 = self.backbone(images)
        up = nn.functional.interpolate
        p5 = self.lateral5(c5)
        p4 = self.lateral4(c4) + up(p5, scale_factor=2)
        p3 = self.lateral3(c3) + up(p4, scale_factor=2)
        maps = self.smooth3(p3), self.smooth4(p4), self.smooth5(p5)
        return [self.head.single(each) for each in maps]


class HeadsByName(Inline):
    """No neck module, and for each level a head of its own name; predictions in five dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.head = None
        self.head_s, self.head_m, self.head_l = (nn.Conv2d(WIDTH, 9, 1) for _ in range(3))
        self.smooth3, self.smoother, self.coarsest = self.smooth3, self.smooth4, self.smooth5
        del self.smooth4, self.smooth5

    def forward(self, images):
        c3, c4, c5 = self.backbone(images)
        p5 = self.coarsest(self.lateral5(c5))
        p4 = self.smoother(self.lateral4(c4) + nn.functional.interpolate(p5, scale_factor=2))
        p3 = self.smooth3(self.lateral3(c3) + nn.functional.interpolate(p4, scale_factor=2))
        return [head(x)[:, None] for head, x in ((self.head_s, p3), (self.head_m, p4), (self.head_l, p5))]


class ListOfOne(nn.Module):
    """A projector that returns a list of one map, before a head."""

    def __init__(self, wrap: Any = lambda each: [each]) -> None:
        super().__init__()
        self.backbone, self.projector, self.head = Backbone(), nn.Module(), Towers()
        self.projector = Projector(wrap)

    def forward(self, images):
        (maps,) = leaves(self.projector(self.backbone(images)[-1]))
        return self.head.single(maps)


class Projector(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.convolution, self.wrap = nn.Conv2d(16, WIDTH, 1), wrap

    def forward(self, x):
        return self.wrap(self.convolution(x))


def leaves(value: Any) -> list[Tensor]:
    """The maps in nested containers."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    items = vars(value).values() if isinstance(value, Features) else value
    items = items.values() if isinstance(items, dict) else items
    return [tensor for item in items if item is not None for tensor in leaves(item)]


class Unwrapping(Detector):
    """A head that is called level by level with what it finds in the neck's result."""

    def __init__(self, wrap: Any) -> None:
        super().__init__(wrap)

    def forward(self, images):
        return [self.head.single(each) for each in leaves(self.neck(self.backbone(images)))]


class Recursive(Detector):
    """The neck runs three times, on its own results."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.neck = TopDown(), TopDown((WIDTH,) * 3)

    def forward(self, images):
        maps = self.first(self.backbone(images))
        for _ in range(3):
            maps = self.neck(maps)
        return self.head(maps)


class InPlace(Detector):
    """What is behind the neck changes its maps in place."""

    def forward(self, images):
        return self.head([each.mul_(2).add_(1) for each in self.neck(self.backbone(images))])


class QueryDecoder(nn.Module):
    """Queries look things up in what an encoder of tokens returns; (N, layers, queries, width) goes out too."""

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        self.attention = nn.ModuleList(nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(layers))

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        found = []
        for attention in self.attention:
            queries = queries + attention(queries, memory, memory)[0]
            found.append(queries)
        return torch.stack(found, 1)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            tokens = tokens + layer(tokens).relu()
        return {"last_hidden_state": tokens}


class QueryDetector(nn.Module):
    """Deformable DETR in small: maps, an encoder of their tokens, a decoder of queries."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.input_proj = nn.ModuleList(nn.Conv2d(width, WIDTH, 1) for width in (8, 12, 16))
        self.encoder, self.decoder, self.head = Encoder(), QueryDecoder(), nn.Linear(WIDTH, 9)
        self.queries = nn.Parameter(torch.zeros(1, 20, WIDTH))

    def forward(self, images):
        maps = [proj(each) for proj, each in zip(self.input_proj, self.backbone(images), strict=True)]
        tokens = torch.cat([each.flatten(2).transpose(1, 2) for each in maps], 1)
        memory = self.encoder(tokens)["last_hidden_state"]
        return {"logits": self.head(self.decoder(self.queries.expand(len(images), -1, -1), memory)[:, -1])}


WRAPS = {
    "list": (list, ["neck[0]", "neck[1]", "neck[2]"]),
    "tuple": (tuple, ["neck[0]", "neck[1]", "neck[2]"]),
    "dict": (
        lambda maps: OrderedDict((f"p{3 + number}", each) for number, each in enumerate(maps)),
        ["neck[p3]", "neck[p4]", "neck[p5]"],
    ),
    "NamedTuple": (lambda maps: Pyramid(*maps), ["neck[0]", "neck[1]", "neck[2]"]),
    "dataclass": (lambda maps: Features(maps), ["neck[maps][0]", "neck[maps][1]", "neck[maps][2]"]),
    "pairs": (
        lambda maps: [(each, torch.ones_like(each[:, 0]) > 0) for each in maps],
        ["neck[0][0]", "neck[1][0]", "neck[2][0]"],
    ),
    "nested": (lambda maps: {"all": ([], (maps,))}, ["neck[all][1][0][0]", "neck[all][1][0][1]", "neck[all][1][0][2]"]),
}
