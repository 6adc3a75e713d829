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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgd_hooks.evaluation.reporting import Curve, draw_curves, markdown_table, spread
from fgd_hooks.evaluation.runs import Run, read_evaluation, read_run

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


logger = logging.getLogger("fgd_hooks")


_LOG_HEADINGS = ("arm", "runs", "mAP50-95", "mAP50", "best mAP50-95", "best epoch", "epochs", "minutes")


_COCO = {"mAP50-95": "map50_95", "mAP50": "map50", "small": "map_small", "medium": "map_medium", "large": "map_large"}


LOG_TITLE = "Last epoch, from the logs (Ultralytics' validator), per cent"


@dataclass(frozen=True)
class Arm:
    """Runs that differ in nothing but the seed.

    Attributes:
        label: what their folders' names have in common.
        runs: one per seed.
    """

    label: str
    runs: tuple[Run, ...]

    def values(self, of: Callable[[Run], float | None]) -> list[float]:
        """One value per run, without those that have none."""
        return [value for run in self.runs if (value := of(run)) is not None]


@dataclass(frozen=True)
class Comparison:
    """What ``fgd compare`` shows.

    Attributes:
        arms: in the order of the command line.
        differing: setting -> its value in each arm, as text.
        notes: what a reader must know: unfinished runs, missing figures.
    """

    arms: tuple[Arm, ...]
    differing: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]

    def tables(self) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
        """Title, headings and rows of each table, as text."""
        found: list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]] = [
            (LOG_TITLE, _LOG_HEADINGS, [_log_row(arm) for arm in self.arms])
        ]
        evaluated = [arm for arm in self.arms if any(run.evaluation for run in arm.runs)]
        if evaluated:
            classes = _class_names(evaluated)
            headings = ("arm", "runs", *_COCO, *classes)
            title = f"{_what_was_evaluated(evaluated)}, per cent"
            found.append((title, headings, [_coco_row(arm, classes) for arm in evaluated]))
        if self.differing:
            rows = [(key, *values) for key, values in self.differing.items()]
            found.append(("Settings that differ", ("setting", *(arm.label for arm in self.arms)), rows))
        return found

    def markdown(self) -> str:
        """The same tables as Markdown."""
        lines: list[str] = []
        for title, headings, rows in self.tables():
            lines += [f"{title}:", "", *markdown_table(headings, rows), ""]
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)]).rstrip() + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers (0 to 1) and texts, ready for JSON."""
        arms = [{"label": arm.label, "runs": [_run_dict(run) for run in arm.runs]} for arm in self.arms]
        return {"arms": arms, "differing": self.differing, "notes": list(self.notes)}

    def draw(self, file: Path) -> None:
        """Draw the validation mAP50-95 of all arms over the epochs that all runs of the arm have, as a PNG."""
        curves = []
        for arm in self.arms:
            logs = [{epoch: 100 * value for epoch, value, _ in run.curve} for run in arm.runs]
            epochs = sorted(set.intersection(*map(set, logs)))
            if epochs:
                curves.append(Curve(arm.label, epochs, [[log[epoch] for epoch in epochs] for log in logs]))
        title = "Validation over the epochs; band: one standard deviation over the seeds"
        draw_curves(curves, file, title=title, ylabel="mAP50-95 on the validation images, %")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table

        for title, headings, rows in self.tables():
            table = Table(title=title, title_justify="left")
            for number, heading in enumerate(headings):
                table.add_column(heading, justify="right" if number else "left", overflow="fold")
            for row in rows:
                table.add_row(*row)
            yield table
        yield from self.notes


def compare(
    folders: Sequence[str | Path],
    *,
    data: str | Path | None = None,
    split: str = "val",
    weights: str = "last",
    device: str | None = None,
) -> Comparison:
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
    return Comparison(arms, _differing(arms), _notes(arms))


def _evaluation(
    run: Run, data: str | Path | None, split: str, weights: str, device: str | None
) -> dict[str, Any] | None:
    if data is None:
        return _kept(run, "eval.json") or _kept(run, f"eval-{split}.json")
    model = run.folder / "weights" / f"{weights}.pt"
    if not model.is_file():
        raise FileNotFoundError(f"{run.folder} has no weights/{weights}.pt, so it cannot be measured on {data}.")
    data = Path(data)
    file = run.folder / f"eval-{data.stem if data.suffix == '.json' else split}.json"
    kept = read_evaluation(file)
    if (
        kept is not None
        and (kept.get("data"), Path(str(kept.get("model"))).name) == (str(data), model.name)
        and _is_newer(file, model)
    ):
        return kept
    from fgd_hooks.evaluation.evaluate import evaluate

    result = evaluate(model, data, split=split, device=device).to_dict()
    file.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def _is_newer(file: Path, model: Path) -> bool:
    """Whether figures were written after the weights, or together with them."""
    return file.stat().st_mtime >= model.stat().st_mtime


def _kept(run: Run, name: str) -> dict[str, Any] | None:
    """Figures that lie in the run; None where there are none, or where the weights they name were written later."""
    file = run.folder / name
    found = read_evaluation(file)
    if found is None:
        return None
    model = run.folder / "weights" / Path(str(found.get("model"))).name
    if model.is_file() and not _is_newer(file, model):
        logger.warning("%s is older than %s and is left out; measure it again with --data.", file, model.name)
        return None
    return found


def _group(runs: Sequence[Run]) -> tuple[Arm, ...]:
    """Runs with the same settings together; one that is unfinished or whose settings are not known stays alone."""
    times = Counter(run.name for run in runs)  # "train", as a rule, in folders of other names
    names = {run.folder: f"{run.folder.parent.name}/{run.name}" if times[run.name] > 1 else run.name for run in runs}
    groups: dict[str, list[Run]] = {}
    for run in runs:
        alone = "" if run.finished and run.distillation is not None else str(run.folder)
        key = json.dumps([run.settings, run.distillation, alone], sort_keys=True, default=str)
        groups.setdefault(key, []).append(run)
    labels: list[str] = []
    for members in groups.values():
        label = _label([names[run.folder] for run in members])
        numbers = itertools.chain((label,), (f"{label} ({number})" for number in itertools.count(2)))
        labels.append(next(each for each in numbers if each not in labels))
    return tuple(
        Arm(label, tuple(sorted(members, key=lambda run: run.seed)))
        for label, members in zip(labels, groups.values(), strict=True)
    )


def _label(names: Sequence[str]) -> str:
    """``yolo-fgd`` for ``yolo-fgd-s0`` and ``yolo-fgd-s1``; the first name where they begin with nothing in common."""
    if len(names) == 1:
        return names[0]
    common = re.sub(r"([-_. ](seed|s))?[-_. ]*\d*$", "", commonprefix(list(names)))  # noqa: RUF071
    return common or names[0]


def _teachers(settings: Mapping[str, Any]) -> str:
    """The file names of a distillation's teachers."""
    names = [share.get("name") for share in settings.get("fgd.teachers") or []] or [settings.get("fgd.teacher.name")]
    return " + ".join(Path(str(name)).name for name in names)


def _differing(arms: Sequence[Arm]) -> dict[str, tuple[str, ...]]:
    """Setting -> value in each arm; FGD's own only where arms with FGD differ in them."""
    table: dict[str, tuple[str, ...]] = {}
    if len(arms) < 2:
        return table
    firsts = [arm.runs[0] for arm in arms]
    own = [run.distillation for run in firsts]
    if any(each != {} for each in own):
        table["FGD"] = tuple(
            "none" if each == {} else "settings unknown" if each is None else f"teacher {_teachers(each)}"
            for each in own
        )
    known = [each for each in own if each]
    for key in sorted({key for each in known for key in each}):
        values = [each.get(key) for each in known]
        if any(value != values[0] for value in values):
            table[key] = tuple(_text(each.get(key)) if each else "-" for each in own)
    for key in sorted({key for run in firsts for key in run.settings}):
        hosts = [run.settings.get(key) for run in firsts]
        if any(value != hosts[0] for value in hosts):
            table[key] = tuple(map(_text, hosts))
    return table


def _notes(arms: Sequence[Arm]) -> tuple[str, ...]:
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
            notes.append(f"Runs of {arm.label} have the same seed ({', '.join(map(str, seeds))}): no spread of seeds.")
    for without, meaning in (
        ([run for run in runs if run.distillation is None], "Distilled, but without fgd.yaml, so each stays alone"),
        ([run for run in runs if run.finished and len(run.curve) == 1], "Validated after the last epoch only"),
        ([run for run in runs if run.evaluation is None], "No AP by class and size (--data DATA.yaml measures it)"),
    ):
        if without:
            notes.append(f"{meaning}: {', '.join(run.name for run in without)}.")
    return tuple(notes)


def _log_row(arm: Arm) -> tuple[str, ...]:
    return (
        arm.label,
        str(len(arm.runs)),
        _percent(arm.values(lambda run: run.last[1] if run.last else None)),
        _percent(arm.values(lambda run: run.last[2] if run.last else None)),
        _percent(arm.values(lambda run: run.best[1] if run.best else None)),
        _spread_or_dash(arm.values(lambda run: run.best[0] if run.best else None), 0),
        _spread_or_dash(arm.values(lambda run: run.epochs), 0) if _epochs_differ(arm) else str(arm.runs[0].epochs),
        _spread_or_dash(arm.values(lambda run: run.minutes), 1),
    )


def _epochs_differ(arm: Arm) -> bool:
    return len({run.epochs for run in arm.runs}) > 1


def _coco_row(arm: Arm, classes: Sequence[str]) -> tuple[str, ...]:
    found = [run.evaluation for run in arm.runs if run.evaluation]
    cells = [_percent([each[key] for each in found if each[key] is not None]) for key in _COCO.values()]
    for name in classes:
        values = [entry["map50_95"] for each in found for entry in each["per_class"] if entry["name"] == name]
        cells.append(_percent([value for value in values if value is not None]))
    return (arm.label, str(len(found)), *cells)


def _class_names(arms: Sequence[Arm]) -> list[str]:
    """Every class of the evaluations, in the order of the first."""
    entries = [
        entry["name"] for arm in arms for run in arm.runs if run.evaluation for entry in run.evaluation["per_class"]
    ]
    return list(dict.fromkeys(entries))


def _what_was_evaluated(arms: Sequence[Arm]) -> str:
    """``val of data.yaml, last.pt, by pycocotools``; says so where the runs were measured on different things."""
    found = [run.evaluation for arm in arms for run in arm.runs if run.evaluation]
    things = {
        " ".join(Path(str(each[key])).name for key in ("data", "split", "model") if each.get(key)) for each in found
    }
    what = "; ".join(sorted(things))
    return f"By pycocotools, {what}" if len(things) == 1 else f"By pycocotools, but on DIFFERENT things: {what}"


def _run_dict(run: Run) -> dict[str, Any]:
    """A run for JSON; mAP from 0 to 1."""
    keys = ("name", "seed", "epochs", "planned", "finished", "minutes", "settings", "distillation", "evaluation")
    names = ("epoch", "map50_95", "map50")
    points = {
        key: dict(zip(names, point, strict=True)) if point else None
        for key, point in (("last", run.last), ("best", run.best))
    }
    return {**{key: getattr(run, key) for key in keys}, **points, "curve": [list(point) for point in run.curve]}


def _percent(values: Sequence[float]) -> str:
    return _spread_or_dash([100 * value for value in values], 1)


def _spread_or_dash(values: Sequence[float], digits: int) -> str:
    return spread(values, digits) if values else "-"


def _text(value: Any) -> str:
    """A setting as text; a path by its name alone."""
    return Path(value).name if isinstance(value, str) and "/" in value else str(value)
