"""Read what a training of Ultralytics left in its run folder."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fgd_hooks.errors import RunError

# Settings that name a run or its files, or say what is shown: runs that differ in nothing else are seeds of one arm.
_FILES = ("name", "save_dir", "project", "exist_ok", "save", "save_period", "cache")
RUN_KEYS = frozenset({*_FILES, "seed", "resume", "workers", "verbose", "plots", "device"})

SHOWN_KEYS = {"fgd.log_interval", "fgd.image_interval"}
"""Settings of the distillation that say what is shown, and change nothing in the training."""

MAP, MAP50 = "metrics/mAP50-95(B)", "metrics/mAP50(B)"  # Ultralytics' names, in results.csv too

_EVALUATION_KEYS = ("map50_95", "map50", "map_small", "map_medium", "map_large", "per_class")


@dataclass(frozen=True)
class RunFolder:
    """One training, as its folder tells it.

    Attributes:
        folder: of the run.
        seed: of the run.
        settings: Ultralytics' settings, without those that only name the run (``RUN_KEYS``).
        distillation: flat settings of FGD, empty for a run without it, None where they are not known.
        curve: (epoch, mAP50-95, mAP50) of every validated epoch, 0 to 1, by Ultralytics' validator.
        epochs: trained.
        planned: epochs that were asked for.
        patience: epochs without a gain after which Ultralytics stops; 0: never.
        minutes: of training, wall time; None where the log does not say.
        evaluation: COCO metrics as ``fgd eval --json`` writes them, None where there are none.
    """

    folder: Path
    seed: int
    settings: dict[str, Any]
    distillation: dict[str, Any] | None
    curve: tuple[tuple[int, float, float], ...]
    epochs: int
    planned: int
    patience: int
    minutes: float | None
    evaluation: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def best(self) -> tuple[int, float, float] | None:
        """The epoch with the highest mAP50-95; None where fewer than two were validated."""
        return max(self.curve, key=lambda entry: entry[1]) if len(self.curve) > 1 else None

    @property
    def last(self) -> tuple[int, float, float] | None:
        """The last epoch, if it was validated."""
        return self.curve[-1] if self.curve and self.curve[-1][0] == self.epochs else None

    @property
    def finished(self) -> bool:
        """Whether it trained all epochs, or stopped because its patience was at an end."""
        stopped = bool(self.best) and 0 < self.patience <= self.epochs - self.best[0]  # type: ignore[index]
        return self.epochs >= self.planned or stopped


def read_run(folder: str | Path) -> RunFolder:
    """Read a run folder: ``results.csv`` and ``args.yaml``, and ``fgd.yaml`` where it exists."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"The run folder {str(folder)!r} does not exist.")
    missing = [name for name in ("results.csv", "args.yaml") if not (folder / name).is_file()]
    if missing:
        inside = sorted(path.parent.name for path in folder.glob("*/results.csv"))
        hint = f" There are runs inside it: {', '.join(inside)}." if inside else ""
        raise RunError(f"{folder} is no run of Ultralytics': {' and '.join(missing)} missing.{hint}")
    settings = _read_yaml(folder / "args.yaml")
    model = Path(str(settings.get("model")))
    own = folder / model.name
    if own.suffix == ".yaml" and own.is_file() and model.parent.name == folder.resolve().name:
        # a study writes its student's yaml into each run's folder: the same model under another path for each seed
        settings["model"] = f"{own.name} {hashlib.sha256(own.read_bytes()).hexdigest()[:8]}"
    rows = _read_csv(folder / "results.csv")
    planned = int(settings.get("epochs") or 0)
    epochs = int(rows[-1]["epoch"])
    # without validation Ultralytics writes zeros for every epoch but the last one it was asked for
    validated = rows if settings.get("val", True) else [row for row in rows if row["epoch"] == planned]
    curve = [(int(row["epoch"]), row[MAP], row[MAP50]) for row in validated if math.isfinite(row[MAP])]
    return RunFolder(
        folder=folder,
        seed=int(settings.get("seed") or 0),
        settings={key: value for key, value in settings.items() if key not in RUN_KEYS},
        distillation=_distillation(folder, any(key.startswith("train/fgd_") for key in rows[0])),
        curve=tuple(curve),
        epochs=epochs,
        planned=planned,
        patience=int(settings.get("patience") or 0),
        minutes=_minutes([row["time"] for row in rows]) if "time" in rows[0] else None,
    )


def weights_of(model: str | Path) -> Path:
    """The weights that a path stands for: of a run's folder its ``last.pt``, or ``best.pt`` where that is alone there.

    Raises:
        FileNotFoundError: a folder without weights.
    """
    path = Path(model)
    if not path.is_dir():
        return path
    places = [folder / name for folder in (path / "weights", path) for name in ("last.pt", "best.pt")]
    found = next(filter(Path.is_file, places), None)
    if found is None:
        raise FileNotFoundError(
            f"The folder {str(path)!r} holds no weights/last.pt; give a run's folder or a weights file."
        )
    return found


def read_evaluation(file: Path) -> dict[str, Any] | None:
    """The content of a file that ``fgd eval --json`` wrote; None where there is no such file."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(
            f"{file} is no valid JSON ({error}); remove it or write it anew with fgd eval --json."
        ) from error
    absent = [key for key in _EVALUATION_KEYS if key not in content] if isinstance(content, dict) else ["an object"]
    if absent:
        raise RunError(f"{file} is not what fgd eval --json writes: {', '.join(absent)} missing.")
    return dict(content)


def _distillation(folder: Path, distilled: bool) -> dict[str, Any] | None:
    """The flat settings of ``fgd.yaml``; it counts only where the log has distillation losses (see ``exist_ok``)."""
    if not distilled:
        return {}
    file = folder / "fgd.yaml"
    if not file.is_file():
        return None
    return {key: value for key, value in flat(_read_yaml(file)).items() if key not in SHOWN_KEYS}


def flat(values: Mapping[str, Any], prefix: str = "fgd.") -> dict[str, Any]:
    """Nested settings as one level of dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"{file} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RunError(f"{file} holds a {type(content).__name__}; expected keys and values.")
    return content


def _read_csv(file: Path) -> list[dict[str, float]]:
    """The rows as numbers; older versions of Ultralytics pad names and numbers with blanks."""
    with file.open(encoding="utf-8", newline="") as stream:
        lines = [[cell.strip() for cell in line] for line in csv.reader(stream) if line]
    if len(lines) < 2:
        raise RunError(f"{file} holds no finished epoch yet.")
    absent = [name for name in ("epoch", MAP, MAP50) if name not in lines[0]]
    if absent:
        raise RunError(f"{file} is no log of a detection training: there is no column {', '.join(absent)}.")
    try:
        return [dict(zip(lines[0], map(float, _fitted(line, lines[0])), strict=True)) for line in lines[1:]]
    except ValueError as error:
        raise RunError(f"{file} is damaged: {error}") from error


def _fitted(line: list[str], names: list[str]) -> list[str]:
    """A row as wide as the header, where the run was resumed with or without distillation since.

    The losses' columns are what differs: those after the host's own, both of train/ and of val/.
    """
    ours = [name.startswith(("train/fgd", "val/fgd")) for name in names]
    if len(line) == len(names) - sum(ours):
        cells = iter(line)
        return ["0" if own else next(cells) for own in ours]
    more = len(line) - len(names) - 1  # of train/: the sum and the parts of the distillation; of val/ the sum alone
    if more > 0 and not any(ours):
        ends = [max(n for n, name in enumerate(names, 1) if name.startswith(part)) for part in ("train/", "val/")]
        return line[: ends[0]] + line[ends[0] + more : ends[1] + more] + line[ends[1] + more + 1 :]
    return line


def _minutes(seconds: list[float]) -> float:
    """Training time from the clock of the log, which starts anew when a training is resumed."""
    ends = [now for now, after in zip(seconds, [*seconds[1:], -1.0], strict=True) if after < now]
    return sum(ends) / 60
