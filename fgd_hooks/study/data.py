"""The images that the runs of a study see: a folder of links and lists, the same for every arm.

Which images a subset holds follows from their names and a seed alone, so a smaller subset lies inside a larger one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fgd_hooks.errors import NoSplitError, StudyError
from fgd_hooks.evaluation.dataset import link_file
from fgd_hooks.evaluation.readers import read_data
from fgd_hooks.study.spec import DataSpec

logger = logging.getLogger("fgd_hooks")

SPLITS = ("train", "val", "test")
_BLOCK = 4096  # bytes: compressed images that differ anywhere differ here, too, and large sets need no reading in whole


@dataclass(frozen=True)
class Prepared:
    """A data set as the runs see it."""

    yaml: Path  # its data yaml
    key: str  # what tells it from every other: names of classes and images, the images' content and all labels
    counts: dict[str, int]  # images by split


@dataclass(frozen=True)
class Source:
    """A data set where it lies: class names, and the image files of each split."""

    names: tuple[str, ...]
    splits: dict[str, tuple[Path, ...]]


def find_file(text: str, root: Path | None, beside: Path) -> Path:
    """A file of a study: absolute, below the data root, or beside the study file; the last place when it is nowhere."""
    path = Path(text).expanduser()
    places = [base / path for base in (root, beside) if base is not None]
    return next((place.resolve() for place in places if place.is_file()), (beside / path).resolve())


def read_source(name: str, spec: DataSpec, root: Path | None, beside: Path, out: Path) -> Source:
    """Find the images of a data set's splits, with the holdout already moved; draws the built-in set where asked."""
    if spec.scenes is not None:
        return _scenes(name, spec.scenes, out)
    file = find_file(str(spec.yaml), root, beside)
    if not file.is_file():
        raise StudyError(
            f"data.{name}.yaml: {spec.yaml!r} is neither below the data root ({root or 'not given'}) nor beside the "
            "study file; give its folder by --data-root or FGD_DATA."
        )
    source = _read(file)
    splits = source.splits
    if spec.holdout:
        if "val" in splits and "test" in splits:
            raise StudyError(f"data.{name}.holdout: {file} has a test split already; leave holdout out.")
        held = set(subset(splits["train"], spec.holdout, spec.subset_seed, "holdout"))
        splits["test"] = splits["val"]
        splits["val"] = tuple(image for image in splits["train"] if image in held)
        splits["train"] = tuple(image for image in splits["train"] if image not in held)
        if not splits["train"]:
            raise StudyError(f"data.{name}.holdout: {spec.holdout} of {len(held)} images leaves none for training.")
    for first, second in itertools.combinations(splits, 2):  # figures on the one say little about new images then
        common = {image.resolve() for image in splits[first]} & {image.resolve() for image in splits[second]}
        if common:
            logger.warning("data.%s: %d images are in both %s and %s.", name, len(common), first, second)
    return source


def subset(images: Sequence[Path], fraction: float, seed: int, purpose: str = "subset") -> tuple[Path, ...]:
    """A share of images, in their order: those whose names, hashed with the seed, come first. Nested."""
    ranked = sorted(images, key=lambda image: hashlib.sha256(f"{purpose} {seed} {image.name}".encode()).digest())
    taken = set(ranked[: max(1, math.floor(fraction * len(images) + 0.5))])
    return tuple(image for image in images if image in taken)


def prepare(name: str, source: Source, out: Path, fraction: float = 1.0, seed: int = 0) -> Prepared:
    """Lay out the data set under ``out``: links to the images, copies of the labels, ``train.txt`` and ``data.yaml``.

    Nothing is written where it is there already, or where the sources lie.
    """
    splits = dict(source.splits)
    splits["train"] = subset(splits["train"], fraction, seed)
    labels = {split: {image: _label(image) for image in images} for split, images in splits.items()}
    key = _key(source.names, labels)
    counts = {split: len(images) for split, images in splits.items()}
    folder = out / f"{name}-{key}"
    if not (folder / "data.yaml").is_file():
        out.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=out))
        try:
            _lay_out(temporary, folder, source.names, labels)
            os.replace(temporary, folder)
        except OSError:
            if not (folder / "data.yaml").is_file():  # another process was not faster
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    else:
        _mend_links(folder, splits)
    return Prepared(folder / "data.yaml", key, counts)


def scan_labels(prepared: Prepared) -> None:
    """Have Ultralytics scan the labels and write its caches beside them.

    Trainings that start together would each write them, and one would find its file removed by the other.
    """
    from ultralytics.data import YOLODataset
    from ultralytics.data.utils import check_det_dataset

    data = check_det_dataset(str(prepared.yaml))
    for split in ("train", "val"):
        YOLODataset(img_path=data[split], data=data, augment=False)


def _mend_links(folder: Path, splits: Mapping[str, Sequence[Path]]) -> None:
    """Let links whose images were moved since point to where the images are now."""
    for split, images in splits.items():
        for image in images:
            link = folder / "images" / split / image.name
            if not link.exists():
                link.unlink(missing_ok=True)
                link_file(image.resolve(), link)


def _lay_out(into: Path, folder: Path, names: Sequence[str], labels: Mapping[str, Mapping[Path, str]]) -> None:
    for split, images in labels.items():
        for kind in ("images", "labels"):
            (into / kind / split).mkdir(parents=True)
        for image, text in images.items():
            label = into / "labels" / split / f"{image.stem}.txt"
            if label.exists():  # one label file would have to serve both
                raise StudyError(f"Two images of {split} are called {image.stem}; rename one of them.")
            link_file(image.resolve(), into / "images" / split / image.name)
            label.write_text(text, encoding="utf-8")
        lines = (f"./images/{split}/{image.name}\n" for image in images)
        (into / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
    content = [f"path: {json.dumps(folder.resolve().as_posix())}"]
    content += [f"{split}: {split}.txt" for split in labels]
    content += ["names:", *(f"  {index}: {json.dumps(text)}" for index, text in enumerate(names))]
    (into / "data.yaml").write_text("\n".join(content) + "\n", encoding="utf-8")


def _read(file: Path) -> Source:
    """Class names and the images of each split of a data yaml that the yaml has."""
    splits: dict[str, tuple[Path, ...]] = {}
    names: tuple[str, ...] = ()
    for split in SPLITS:
        try:
            data = read_data(file, split)
        except (NoSplitError, FileNotFoundError) as error:
            if split != "test":
                raise
            if isinstance(error, FileNotFoundError):  # images without labels, as in COCO's test-dev, or none at all
                logger.warning("The test split is left out: %s", error)
            continue
        names = data.names
        splits[split] = tuple(image.file for image in data.images)
    return Source(names, splits)


def _scenes(name: str, settings: Mapping[str, object], out: Path) -> Source:
    from fgd_hooks.study.scenes import SceneSettings, make_dataset

    try:
        wanted = SceneSettings(**settings)  # type: ignore[arg-type]
        other = replace(wanted, train=1, seed=wanted.seed + 1000)  # for its val alone
    except (TypeError, ValueError) as error:
        raise StudyError(f"data.{name}.scenes: {error}") from error
    drawn = []
    for each in (wanted, other):
        key = hashlib.sha256(json.dumps(asdict(each), sort_keys=True).encode()).hexdigest()[:10]
        drawn.append(_read(make_dataset(out / f"drawn-{key}", each)))
    return Source(drawn[0].names, {**drawn[0].splits, "test": drawn[1].splits["val"]})


def _label(image: Path) -> str:
    from ultralytics.data.utils import img2label_paths

    file = Path(img2label_paths([str(image)])[0])
    return file.read_text(encoding="utf-8-sig") if file.is_file() else ""


def _content(image: Path) -> str:
    """What tells an image from another one of its name: a hash of its size and of three blocks of its bytes."""
    size = image.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with image.open("rb") as stream:
        for start in (0, size // 2, max(0, size - _BLOCK)):
            stream.seek(start)
            digest.update(stream.read(_BLOCK))
    return digest.hexdigest()[:16]


def _key(names: Iterable[str], labels: Mapping[str, Mapping[Path, str]]) -> str:
    content = {
        split: [(image.name, _content(image), text) for image, text in images.items()]
        for split, images in labels.items()
    }
    return hashlib.sha256(json.dumps([list(names), content]).encode()).hexdigest()[:10]
