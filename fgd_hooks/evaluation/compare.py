"""Compare training runs: the engine of ``fgd compare``.

Runs whose settings differ in nothing but the seed (and in names of files) are one arm: its figures are mean and
standard deviation over the seeds. Two kinds of figures are kept apart: those of the training's own log, by Ultralytics'
validator, and COCO metrics of the weights by pycocotools, which know classes and sizes (docs/evaluation.md).
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgd_hooks.evaluation.arms import Arm, mean_interval
from fgd_hooks.evaluation.reporting import Curve, Table, draw_curves, plain, spread
from fgd_hooks.evaluation.runs import RunFolder, read_evaluation, read_run

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

logger = logging.getLogger("fgd_hooks")

_LOG_HEADINGS = ("arm", "runs", "mAP50-95", "mAP50", "best mAP50-95", "best epoch", "epochs", "minutes")
_COCO = {"mAP50-95": "map50_95", "mAP50": "map50", "small": "map_small", "medium": "map_medium", "large": "map_large"}
LOG_TITLE = "Last epoch, from the logs (Ultralytics' validator), per cent"


@dataclass(frozen=True)
class ComparedRuns:
    """What ``fgd compare`` shows.

    Attributes:
        arms: in the order of the command line.
        differing: setting -> its value in each arm, as text.
        notes: what a reader must know: unfinished runs, missing figures.
    """

    arms: tuple[Arm[RunFolder], ...]
    differing: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]

    def tables(self) -> list[Table]:
        """From the logs, from the evaluations where there are any, and of the settings where they differ."""
        headings: tuple[str, ...] = _LOG_HEADINGS
        rows = [_log_row(arm) for arm in self.arms]
        if len(self.arms) > 1:
            base = next((arm for arm in self.arms if arm.runs[0].distillation == {}), self.arms[0])
            headings = (*_LOG_HEADINGS, f"mAP50-95 above {base.name}")
            rows = [(*row, _difference(arm, base)) for row, arm in zip(rows, self.arms, strict=True)]
        found = [Table(headings, rows, LOG_TITLE)]
        evaluated = [arm for arm in self.arms if any(run.evaluation for run in arm.runs)]
        if evaluated:
            every = [run.evaluation for arm in evaluated for run in arm.runs if run.evaluation]
            classes = list(dict.fromkeys(entry["name"] for each in every for entry in each["per_class"]))
            rows = [_coco_row(arm, classes) for arm in evaluated]
            found.append(Table(("arm", "runs", *_COCO, *classes), rows, f"{_what_was_evaluated(every)}, per cent"))
        if self.differing:
            rows = [(key, *values) for key, values in self.differing.items()]
            found.append(Table(("setting", *(arm.name for arm in self.arms)), rows, "Settings that differ"))
        return found

    def markdown(self) -> str:
        """The same tables as Markdown."""
        lines: list[str] = []
        for table in self.tables():
            lines += [f"{table.title}:", "", *table.markdown(), ""]
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)]).rstrip() + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers (0 to 1) and texts, ready for JSON."""
        arms = [{"label": arm.name, "runs": [_run_dict(run) for run in arm.runs]} for arm in self.arms]
        return {"arms": arms, "differing": self.differing, "notes": list(self.notes)}

    def draw(self, file: Path) -> None:
        """Draw the validation mAP50-95 of all arms over the epochs that all runs of the arm have, as a PNG."""
        curves = []
        for arm in self.arms:
            logs = [{epoch: 100 * value for epoch, value, _ in run.curve} for run in arm.runs]
            epochs = sorted(set.intersection(*map(set, logs)))
            if epochs:
                curves.append(Curve(arm.name, epochs, [[log[epoch] for epoch in epochs] for log in logs]))
        title = "Validation over the epochs; band: one standard deviation over the seeds"
        draw_curves(curves, file, title=title, ylabel="mAP50-95 on the validation images, %")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from (table.rich(title_justify="left") for table in self.tables())
        yield from map(plain, self.notes)


def compare(
    folders: Sequence[str | Path],
    *,
    data: str | Path | None = None,
    split: str = "val",
    weights: str = "last",
    device: str | None = None,
) -> ComparedRuns:
    """Read runs, group seeds, and say what differs.

    Args:
        folders: of Ultralytics runs; one that is given twice counts once.
        data: a data yaml or COCO json on which the weights of every run are measured by pycocotools. The result is
            kept in the run as ``eval-SPLIT.json`` (``eval-NAME.json`` for a json) and taken from there while it is
            newer than the weights. None: only what lies there already, ``eval.json`` first, is shown.
        split: of the data yaml.
        weights: "last" or "best". The best were chosen on val, so that their figures on val are too good.
        device: where the weights are measured, as in Ultralytics.

    Raises:
        FileNotFoundError: a folder, the data or weights are missing.
        RunError: a folder is no run, or one of its files is damaged.
        DataError: data and model do not go together.
    """
    paths = dict.fromkeys(Path(folder).resolve() for folder in folders)
    runs = [read_run(folder) for folder in paths]
    measured = [replace(run, evaluation=_evaluation(run, data, split, weights, device)) for run in runs]
    arms = _group(measured)
    return ComparedRuns(arms, _differing(arms), _notes(arms))


def _evaluation(
    run: RunFolder, data: str | Path | None, split: str, weights: str, device: str | None
) -> dict[str, Any] | None:
    """Figures that lie in the run and are not older than the weights they name; with data, these or new ones."""
    if data is None:
        return next(filter(None, (_kept(run.folder / f"{name}.json") for name in ("eval", f"eval-{split}"))), None)
    model, data = run.folder / "weights" / f"{weights}.pt", Path(data)
    if not model.is_file():
        raise FileNotFoundError(f"{run.folder} has no weights/{weights}.pt, so it cannot be measured on {data}.")
    file = run.folder / f"eval-{data.stem if data.suffix == '.json' else split}.json"
    kept = _kept(file, quiet=True)
    if kept is not None and (kept.get("data"), Path(str(kept.get("model"))).name) == (str(data), model.name):
        return kept
    from fgd_hooks.evaluation.evaluate import evaluate

    result = evaluate(model, data, split=split, device=device).to_dict()
    file.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def _kept(file: Path, quiet: bool = False) -> dict[str, Any] | None:
    """Figures in a run's folder; None where there are none, or where the weights they name were written later."""
    found = read_evaluation(file)
    model = file.parent / "weights" / Path(str(found and found.get("model"))).name
    if found is None or not model.is_file() or file.stat().st_mtime >= model.stat().st_mtime:
        return found
    if not quiet:
        logger.warning("%s is older than %s and is left out; measure it again with --data.", file, model.name)
    return None


def _group(runs: Sequence[RunFolder]) -> tuple[Arm[RunFolder], ...]:
    """Runs with the same settings together; one that is unfinished or whose settings are not known stays alone."""
    times = Counter(run.name for run in runs)  # "train", as a rule, in folders of other names
    groups: dict[str, list[RunFolder]] = {}
    for run in runs:
        alone = "" if run.finished and run.distillation is not None else str(run.folder)
        key = json.dumps([run.settings, run.distillation, alone], sort_keys=True, default=str)
        groups.setdefault(key, []).append(run)
    arms: dict[str, Arm[RunFolder]] = {}
    for members in groups.values():
        label = _label([f"{run.folder.parent.name}/{run.name}" if times[run.name] > 1 else run.name for run in members])
        numbers = itertools.chain((label,), (f"{label} ({number})" for number in itertools.count(2)))
        name = next(each for each in numbers if each not in arms)
        arms[name] = Arm(name, tuple(sorted(members, key=lambda run: run.seed)))
    return tuple(arms.values())


def _label(names: Sequence[str]) -> str:
    """``yolo-fgd`` for ``yolo-fgd-s0`` and ``yolo-fgd-s1``; the first name where they begin with nothing in common."""
    if len(names) == 1:
        return names[0]
    common = re.sub(r"([-_. ](seed|s))?[-_. ]*\d*$", "", commonprefix(list(names)))  # noqa: RUF071
    return common or names[0]


def _teachers(settings: Mapping[str, Any] | None) -> str:
    """The file names of a distillation's teachers."""
    if not settings:
        return "settings unknown" if settings is None else "none"
    names = [share.get("name") for share in settings.get("fgd.teachers") or []] or [settings.get("fgd.teacher.name")]
    return "teacher " + " + ".join(Path(str(name)).name for name in names)


def _differing(arms: Sequence[Arm[RunFolder]]) -> dict[str, tuple[str, ...]]:
    """Setting -> value in each arm; FGD's own only where arms with FGD differ in them."""
    if len(arms) < 2:
        return {}
    table: dict[str, tuple[str, ...]] = {}
    own = [arm.runs[0].distillation for arm in arms]
    if any(each != {} for each in own):
        table["FGD"] = tuple(map(_teachers, own))
    known = [each for each in own if each]
    for key in sorted({key for each in known for key in each}):
        if _differ([each.get(key) for each in known]):
            table[key] = tuple(_text(each.get(key)) if each else "-" for each in own)
    hosts = [arm.runs[0].settings for arm in arms]
    for key in sorted({key for each in hosts for key in each}):
        if _differ([each.get(key) for each in hosts]):
            table[key] = tuple(_text(each.get(key)) for each in hosts)
    return table


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)


def _notes(arms: Sequence[Arm[RunFolder]]) -> tuple[str, ...]:
    runs = [run for arm in arms for run in arm.runs]
    notes = [
        f"{run.name} is unfinished: {run.epochs} of {run.planned} epochs (it still runs, or was interrupted); it is "
        "compared on its own, by its last epoch."
        for run in runs
        if not run.finished
    ]
    for arm in arms:
        seeds = [run.seed for run in arm.runs]
        if len(set(seeds)) < len(seeds):
            notes.append(f"Runs of {arm.name} have the same seed ({', '.join(map(str, seeds))}): no spread of seeds.")
    for without, meaning in (
        ([run for run in runs if run.distillation is None], "Distilled, but without fgd.yaml, so each stays alone"),
        ([run for run in runs if run.finished and len(run.curve) == 1], "Validated after the last epoch only"),
        ([run for run in runs if run.evaluation is None], "No AP by class and size (--data DATA.yaml measures it)"),
    ):
        if without:
            notes.append(f"{meaning}: {', '.join(run.name for run in without)}.")
    return tuple(notes)


def _difference(arm: Arm[RunFolder], base: Arm[RunFolder]) -> str:
    """Points above another arm at the same seeds, and the interval of their mean: ``+1.2 (+0.7 .. +1.7)``."""
    one, other = (each.by_seed(lambda run: 100 * run.last[1] if run.last else None) for each in (arm, base))
    differences = [value - other[seed] for seed, value in one.items() if seed in other]
    if arm is base or not differences or any(len({run.seed for run in a.runs}) < len(a.runs) for a in (arm, base)):
        return "-"
    gain = mean_interval(differences)
    return f"{gain.mean:+.1f} ({gain})"


def _log_row(arm: Arm[RunFolder]) -> tuple[str, ...]:
    lasts = [run.last for run in arm.runs if run.last]
    bests = [run.best for run in arm.runs if run.best]
    epochs = arm.values(lambda run: run.epochs)
    return (
        arm.name,
        str(len(arm.runs)),
        spread([100 * value for _, value, _ in lasts]),
        spread([100 * value for _, _, value in lasts]),
        spread([100 * value for _, value, _ in bests]),
        spread([epoch for epoch, _, _ in bests], 0),
        spread(epochs, 0) if len(set(epochs)) > 1 else str(arm.epochs),
        spread(arm.values(lambda run: run.minutes)),
    )


def _coco_row(arm: Arm[RunFolder], classes: Sequence[str]) -> tuple[str, ...]:
    found = [run.evaluation for run in arm.runs if run.evaluation]
    columns = [[each[key] for each in found] for key in _COCO.values()]
    columns += [
        [entry["map50_95"] for each in found for entry in each["per_class"] if entry["name"] == name]
        for name in classes
    ]
    cells = [spread([100 * value for value in column if value is not None]) for column in columns]
    return (arm.name, str(len(found)), *cells)


def _what_was_evaluated(found: Sequence[Mapping[str, Any]]) -> str:
    """``val of data.yaml, last.pt, by pycocotools``; says so where the runs were measured on different things."""
    things = {
        " ".join(Path(str(each[key])).name for key in ("data", "split", "model") if each.get(key)) for each in found
    }
    what = "; ".join(sorted(things))
    return f"By pycocotools, {what}" if len(things) == 1 else f"By pycocotools, but on DIFFERENT things: {what}"


def _run_dict(run: RunFolder) -> dict[str, Any]:
    """A run for JSON; mAP from 0 to 1."""
    keys = ("name", "seed", "epochs", "planned", "finished", "minutes", "settings", "distillation", "evaluation")
    names = ("epoch", "map50_95", "map50")
    points = {
        key: dict(zip(names, point, strict=True)) if point else None
        for key, point in (("last", run.last), ("best", run.best))
    }
    return {**{key: getattr(run, key) for key in keys}, **points, "curve": [list(point) for point in run.curve]}


def _text(value: Any) -> str:
    """A setting as text; a path by its name alone."""
    return Path(value).name if isinstance(value, str) and "/" in value else str(value)
