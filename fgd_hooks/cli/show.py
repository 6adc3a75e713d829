"""The engine of ``fgd show``: pictures of what a trained student and its teacher attend to, as PNG files."""

from __future__ import annotations

import argparse
import inspect
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fgd_hooks.cli.settings import check_host, check_settings, check_types, split_settings
from fgd_hooks.config import FGDConfig, load_config
from fgd_hooks.diagnostics.attention import LevelSheet, attention_distances, attention_sheets
from fgd_hooks.diagnostics.plots import Detection, save_detections, save_sheets
from fgd_hooks.distiller import Distiller
from fgd_hooks.errors import CheckpointError, ConfigError, DataError
from fgd_hooks.evaluation.dataset import load_letterboxed, load_sample, open_image
from fgd_hooks.evaluation.evaluate import load_detector
from fgd_hooks.evaluation.readers import quiet_ultralytics, read_data
from fgd_hooks.evaluation.runs import weights_of
from fgd_hooks.integrations.ultralytics.settings import SETTINGS_FILE
from fgd_hooks.integrations.ultralytics.teacher import as_list, fuse_files, load_teachers, with_score_taps
from fgd_hooks.pairing import signature
from fgd_hooks.utils.checkpoint import LAST_CHECKPOINT, SUFFIX, read_checkpoint
from fgd_hooks.utils.structured_config import read_yaml

logger = logging.getLogger("fgd_hooks")

FOLDER_IMAGES = 4


@dataclass(frozen=True)
class Shown:
    """What :func:`show` did.

    Attributes:
        files: the pictures of the attention.
        detections: the pictures of what teacher and student find.
        adapters: where the adapters come from, one sentence.
        adapted: whether they are trained, so that student and teacher compare as in the loss.
        distances: level to attention distance, mean over the images.
    """

    files: list[Path]
    detections: list[Path]
    adapters: str
    adapted: bool
    distances: dict[str, float]


def show(
    student: str | Path,
    teacher: str | Path,
    data: str | Path | None = None,
    *,
    images: int | str | Path | Sequence[str | Path] = 4,
    split: str = "val",
    imgsz: int | None = None,
    out: str | Path = "fgd_show",
    top: int = 10,
    config: FGDConfig | str | Path | None = None,
    overrides: Sequence[str] = (),
    before: str | Path | None = None,
) -> Shown:
    """Draw one sheet per image and level, and for each image what teacher and student find.

    Adapters are read from the side file beside the student's weights. Where there is none, the sheets hold the
    student's own spatial attention and leave its channels out.

    Args:
        student: weights of the student, or the folder of its run.
        teacher: the same of the teacher that it was trained with, or a list of them.
        data: data yaml (YOLO format) or annotation json (COCO format) with the true boxes.
        images: how many images of the split, evenly spaced among those with boxes; or files, or a folder of them (as
            text with commas between), whose boxes are looked up in ``data`` if that is given.
        split: key of the data yaml.
        imgsz: longer side of the input in pixels; None: what the student was trained with.
        out: folder for the pictures.
        top: number of channels.
        config: settings of the distillation; None: the ``fgd.yaml`` of the student's run, else the defaults.
        overrides: single settings that win, ``["levels=[P3]"]``.
        before: weights of the student before its training, whose detections are drawn, too; None: those that its run
            began with, where these lie there still.
    """
    for key, value in (("images", images), ("imgsz", imgsz), ("top", top)):
        if isinstance(value, (int, float)) and (value < 1 or value != int(value)):
            raise ConfigError(f"{key} is {value!r}; expected a whole number, 1 or more.")
    student = weights_of(student)
    loaded = load_detector(student)
    model = loaded.model.float()
    if imgsz is None:
        imgsz = int(getattr(loaded, "overrides", {}).get("imgsz", 640))
    if config is None and (recorded := Path(student).parent.parent / SETTINGS_FILE).is_file():
        config = recorded
    settings = load_config(config, overrides)
    file = _side_file(Path(student))
    state = read_checkpoint(file).get("distiller", {}) if file else {}
    if file:
        settings.adapter = state.get("adapter", settings.adapter)
        # "P3-teacher2-cwd: stride ..." is of the level P3
        saved = [str(each).partition(":")[0].partition("-")[0] for each in state.get("levels", [])]
        settings.levels = settings.levels or list(dict.fromkeys(saved)) or None
    teachers = fuse_files(load_teachers(teacher), teacher, settings.teacher)
    with Distiller(model, teacher=teachers, config=with_score_taps(settings, teachers)) as distiller:
        adapted = file is not None or not any(True for _ in distiller.adapters.parameters())
        if file:
            load_adapters(distiller, state, file)
            adapters = f"Adapters from {file}."
        elif adapted:
            adapters = "There are no adapters to load: all levels have equal channels."
        else:
            adapters = (
                f"There is no {LAST_CHECKPOINT} beside {student}, so no trained adapters: the sheets show the "
                "student's own feature maps, and channels of the teacher only."
            )
        stride = max(pair.student.stride for pair in distiller.pairs)
        stride = max(stride, *(int(each) for each in getattr(model, "stride", torch.tensor([32]))))
        sheets: list[LevelSheet] = []
        channels = int((getattr(model, "yaml", None) or {}).get("channels", 3))
        files = []
        for source, image, boxes in _samples(data, images, split, imgsz, stride, channels):
            files.append(source)
            name = source.stem
            sheets += attention_sheets(distiller, model, image[None], [boxes], adapted=adapted, names=[name])
    models = {"teacher": as_list(teacher)[0], "student before": before or _begun_with(student), "student": student}
    drawn = _draw_detections(
        files, {title: str(each) for title, each in models.items() if each}, imgsz, Path(out), channels
    )
    return Shown(save_sheets(sheets, out, top=top), drawn, adapters, adapted, attention_distances(sheets))


def show_command(arguments: argparse.Namespace) -> None:
    """``fgd show``: check the keys, draw, and say what was drawn and how far student and teacher are apart."""
    settings, overrides = split_settings(arguments.settings)
    known = [name for name in inspect.signature(show).parameters if name != "overrides"]
    required = {"student": "weights of the student", "teacher": "weights of its teacher"}
    check_settings(settings, required, [*known, "fgd.*"])
    check_host(settings)
    check_types({key: value for key, value in settings.items() if key != "teacher"}, show)
    shown = show(**settings, overrides=overrides)
    print(shown.adapters)
    if shown.adapted:
        for level, distance in shown.distances.items():
            print(f"{level}: attention distance of student and teacher {distance:.3f} (0 equal, below 2)")
    print(f"Attention in {shown.files[0].parent}: {', '.join(file.name for file in shown.files)}")
    print(f"Detections in the same folder: {', '.join(file.name for file in shown.detections)}")


def load_adapters(distiller: Distiller, state: dict[str, Any], file: Path) -> None:
    """Load the adapters alone of a training state, for the levels that the distiller has."""
    saved, modules = state.get("levels", []), state.get("modules", {})
    for pair in distiller.pairs:
        if signature(pair) not in saved:
            raise CheckpointError(
                f"{file} holds adapters for {'; '.join(map(str, saved))} (student / teacher), but these models pair as "
                f"{signature(pair)}. Give the teacher that this student was trained with, or move the file away."
            )
    names = [key for key in distiller.adapters.state_dict() if f"adapters.{key}" in modules]
    try:
        distiller.adapters.load_state_dict({key: modules[f"adapters.{key}"] for key in names})
    except RuntimeError as error:
        raise CheckpointError(f"{file} does not hold the adapters of these levels: {error}") from error


def _begun_with(student: Path) -> str | None:
    """The weights file that the student's run began with, as its ``args.yaml`` names it, where it is there."""
    file = student.parent.parent / "args.yaml"
    name = str(read_yaml(file).get("model")) if file.is_file() else ""
    return name if name.endswith(".pt") and Path(name).is_file() and not Path(name).samefile(student) else None


def _draw_detections(
    files: Sequence[Path], models: Mapping[str, str], imgsz: int, out: Path, channels: int
) -> list[Path]:
    """Draw what each model finds in each image, from a confidence of 0.25 on; a teacher of another task is left out."""
    found: list[dict[str, list[Detection]]] = [{} for _ in files]
    for title, model in models.items():
        try:
            yolo = load_detector(model)
        except DataError as error:
            logger.warning("The %s's detections are not drawn: %s", title, error)
            continue
        with quiet_ultralytics():
            for panels, file in zip(found, files, strict=True):
                (result,) = yolo.predict(str(file), imgsz=imgsz, conf=0.25, verbose=False)
                rows = zip(
                    result.boxes.cls.tolist(), result.boxes.conf.tolist(), result.boxes.xyxy.tolist(), strict=True
                )
                panels[title] = [(result.names[int(number)], score, box) for number, score, box in rows]
    names = [f"{re.sub(r'[^A-Za-z0-9._-]+', '_', file.stem)}_detections.png" for file in files]
    return [
        save_detections(np.asarray(open_image(file, channels)), panels, out / name)
        for file, panels, name in zip(files, found, names, strict=True)
    ]


def _side_file(student: Path) -> Path | None:
    """The side file beside a student's weights; that of best.pt is the one of last.pt."""
    files = [student.with_name(name) for name in (student.stem + SUFFIX, LAST_CHECKPOINT)]
    return next(filter(Path.is_file, files), None)


def _samples(
    data: str | Path | None,
    images: int | str | Path | Sequence[str | Path],
    split: str,
    imgsz: int,
    stride: int,
    channels: int,
) -> Iterator[tuple[Path, Tensor, Tensor]]:
    """File, pixels (3, H, W) and boxes (n, 4) of each image: evenly spaced ones of the data, or those of the files."""
    truth = read_data(data, split).images if data is not None else []
    if isinstance(images, int):
        if data is None:
            raise ConfigError("data= is missing: a data yaml or a COCO json, or give image files as images=.")
        usable = [image for image in truth if len(image.boxes)]
        count = min(images, len(usable))
        files = [usable[number * len(usable) // count].file for number in range(count)]
    else:
        files = _image_files(images)
    known = {image.file.resolve(): image for image in truth}
    for file in files:
        if (image := known.get(file.resolve())) is not None:
            yield (file, *load_sample(image, imgsz, stride, channels))
        else:
            yield file, load_letterboxed(file, imgsz, stride, channels)[0], torch.zeros(0, 4)


def _image_files(images: str | Path | Sequence[str | Path]) -> list[Path]:
    given = images.split(",") if isinstance(images, str) else [images] if isinstance(images, Path) else images
    files: list[Path] = []
    for each in (Path(str(item).strip()) for item in given):
        if not each.exists():
            raise FileNotFoundError(f"The image {str(each)!r} does not exist (looked in {Path.cwd()}).")
        known = Image.registered_extensions() if each.is_dir() else {}
        found = sorted(f for f in each.iterdir() if f.suffix.lower() in known) if each.is_dir() else [each]
        if not found:
            raise DataError(f"The folder {str(each)!r} holds no image.")
        if len(found) > FOLDER_IMAGES:
            logger.warning(
                "%s: the first %d of %d images; name files for others, images=a.png,b.png.",
                each,
                FOLDER_IMAGES,
                len(found),
            )
        files += found[:FOLDER_IMAGES]
    return files
