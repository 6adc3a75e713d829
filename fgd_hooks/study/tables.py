"""The tables of a study, from its collected records alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fgd_hooks.errors import StudyError
from fgd_hooks.evaluation.arms import Comparison, Interval, Record, compare_arms
from fgd_hooks.evaluation.reporting import Table, spread
from fgd_hooks.study.records import RUNS, read_runs, read_study

MAX_CLASSES = 12
SUBJECT = "fgd"
"""The arm that is also compared with every other one, unless ``study.json`` names another as ``subject``."""


def read_comparisons(folder: Path) -> tuple[dict[str, Any], list[Comparison]]:
    """What a folder of collected results asks (``study.json``), and the comparisons of its runs."""
    if not folder.is_dir():
        raise FileNotFoundError(f"The folder of collected results {str(folder)!r} does not exist; collect them first.")
    study = read_study(folder)
    records = []
    for name, run in read_runs(folder).items():
        try:
            records.append(Record.from_dict(run, folder.name))
        except KeyError as error:
            raise StudyError(f"{folder / RUNS}: {name} is no collected run: there is no {error}.") from error
    if not records:
        raise StudyError(f"{folder} holds no collected run.")
    return study, compare_arms(records, study.get("arms", ()), study.get("baseline", "alone"))


def markdown(study: Mapping[str, Any], groups: Sequence[Comparison], name: str) -> str:
    """All tables of a study."""
    baseline = study.get("baseline", "alone")
    lines = [f"# {study.get('name', name)}", ""]
    lines += [study["about"], ""] if study.get("about") else []
    lines += [
        "mAP50-95 by pycocotools of the last weights, per cent: mean ± standard deviation over the seeds. Difference: "
        f"to `{baseline}` with the same seed, its mean and 95 % t-interval. Gap: the difference as a share of what the "
        f"teacher is above `{baseline}`. CPU: seconds of the training as a multiple of `{baseline}`'s.",
        "",
    ]
    for group in groups:
        for split in group.splits:
            lines += [heading(group, split), "", *_main_table(group, split), ""]
            lines += _compute_note(group, split, study.get("compute", {}))
            lines += _subject_table(group, split, study.get("subject", SUBJECT))
            lines += _class_table(group, split)
        lines += _batch_note(group)
    return "\n".join(lines).rstrip() + "\n"


def heading(group: Comparison, split: str) -> str:
    """The line above a comparison's tables."""
    return f"## {group.data}, {group.student}: {split}"


def write_tables(folder: Path) -> str:
    """Write ``tables.md`` and a picture for each of its sections into a folder of results; returns the Markdown."""
    from fgd_hooks.study.plots import draw_group, picture

    study, groups = read_comparisons(folder)
    text = markdown(study, groups, folder.name)
    (folder / "tables.md").write_text(text, encoding="utf-8")
    for group in groups:
        for split in group.splits:
            draw_group(group, split, folder / picture(group, split))
    return text


def _main_table(group: Comparison, split: str) -> list[str]:
    headings = ("arm", "epochs", "seeds", "mAP50-95", "difference", "95 % interval", "gap", "CPU")
    rows = []
    for arm in group.arms:
        values = group.values(arm, split)
        if not values:
            continue
        gain, closed, cost = group.gain(arm, split), group.closed(arm, split), group.cost(arm)
        rows.append(
            (
                arm.name,
                str(arm.epochs),
                ", ".join(map(str, values)),
                spread(list(values.values())),
                "" if gain is None else f"{gain.mean:+.1f}",
                "" if gain is None else str(gain) + _pairs(gain, len(values)),
                "" if closed is None else f"{100 * closed:.0f} %",
                "" if cost is None else f"{cost:.2f}",
            )
        )
    value = group.teacher.value(split) if group.teacher else None
    if group.teacher is not None and value is not None:
        epochs = str(group.teacher.epochs or "")
        rows.append((f"teacher ({group.teacher.student})", epochs, "", f"{value:.1f}", "", "", "", ""))
    return Table(headings, rows).markdown()


def _pairs(gain: Interval, runs: int) -> str:
    """How many seeds a difference rests on, where that is not all that the row shows."""
    return "" if gain.count == runs else f" ({gain.count} of {runs} seeds)"


def _compute_note(group: Comparison, split: str, compute: Mapping[str, str]) -> list[str]:
    """What the arms that were to cost as much as another one did cost; nothing where there is none."""
    parts = []
    for name, other in compute.items():
        arm, over = group.arm(name), group.arm(other)
        if arm and over and group.values(arm, split) and group.values(over, split):
            ratio = group.cost(arm, over)
            parts += [] if ratio is None else [f"`{name}` {ratio:.2f} of `{other}`"]
    return [f"CPU seconds of arms of equal compute: {', '.join(parts)}.", ""] if parts else []


def _subject_table(group: Comparison, split: str, subject: str) -> list[str]:
    """One arm less each of the others, seed by seed; nothing where that adds nothing to the main table."""
    mine = group.arm(subject)
    rows = []
    for arm in group.arms:
        if mine is not None and arm is not group.baseline and (gain := group.gain(mine, split, arm)) is not None:
            rows.append((arm.name, str(gain.count), f"{gain.mean:+.1f}", str(gain)))
    headings = (f"`{subject}` less", "seeds", "difference", "95 % interval")
    return [*Table(headings, rows).markdown(), ""] if rows else []


def _class_table(group: Comparison, split: str) -> list[str]:
    """Mean AP of each class by arm; nothing for a single class, or for more than a table holds."""
    found = {arm.name: [classes for run in arm.runs if (classes := run.classes(split))] for arm in group.arms}
    names = list(next(runs for runs in found.values() if runs)[0])
    if not 1 < len(names) <= MAX_CLASSES:
        return []
    rows = []
    for arm, runs in found.items():
        columns = [[value for run in runs if (value := run.get(name)) is not None] for name in names]
        if runs:
            rows.append((arm, *(f"{statistics.fmean(column):.1f}" if column else "-" for column in columns)))
    return [*Table(("mAP50-95 by class", *names), rows).markdown(), ""]


def _batch_note(group: Comparison) -> list[str]:
    """Whether all arms of as many epochs were fed the same batches; nothing where that was not recorded."""
    if group.baseline is None or any(run.batches is None for arm in group.arms for run in arm.runs):
        return []
    others = [arm for arm in group.arms if arm.epochs == group.baseline.epochs and arm is not group.baseline]
    same = {arm.name: group.same_batches(arm) for arm in others}
    if different := [name for name, found in same.items() if found is False]:
        return [f"Not fed the same batches as `{group.baseline.name}`: {', '.join(different)}.", ""]
    if unknown := [name for name, found in same.items() if found is None]:
        return [f"Batches not compared, for want of a common seed: {', '.join(unknown)}.", ""]
    text = "All arms of equal epochs were fed the same batches, pixel by pixel (compared by checksum)."
    return [text, ""] if same else []
