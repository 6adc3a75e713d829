"""The tables of a study, from its collected records alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fgd_hooks.errors import StudyError
from fgd_hooks.evaluation.arms import Arm, Group, Interval, Record, cost_ratio
from fgd_hooks.evaluation.reporting import markdown_table, spread
from fgd_hooks.study.processes import read_json
from fgd_hooks.study.records import STUDY
from fgd_hooks.study.spec import TAKEN

MAX_CLASSES = 12
SUBJECT = "fgd"
"""The arm that is also compared with every other one, unless ``study.json`` names another as ``subject``."""


def read_records(folder: Path) -> tuple[dict[str, Any], list[Record]]:
    """``study.json`` (empty where there is none) and all records of a folder.

    Raises:
        FileNotFoundError: there is no such folder.
        StudyError: it holds no record, or a file that is none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"The folder of collected results {str(folder)!r} does not exist; collect them first.")
    study = read_json(folder / STUDY) if (folder / STUDY).is_file() else {}
    records = []
    for file in sorted(folder.glob("*.json")):
        if file.name == STUDY:
            continue
        try:
            content = read_json(file)
            values = {key: content[key] for key in ("student", "arm", "epochs", "seed", "cpu_s", "results")}
        except (KeyError, ValueError, TypeError) as error:
            raise StudyError(f"{file} is no collected run: {error!r}.") from error
        values["settings"] = json.dumps([content.get(key) for key in ("settings", "fgd", "scale")], sort_keys=True)
        values |= {"batches": content.get("batches"), "device": content.get("device", "cpu")}
        records.append(Record(data=content.get("data", folder.name), **values))
    if not records:
        raise StudyError(f"{folder} holds no collected run.")
    return study, records


def group_records(records: Sequence[Record], order: Sequence[str] = (), baseline: str = "alone") -> list[Group]:
    """The records by data set and student; arms in the given order, then by name.

    Raises:
        StudyError: an arm has two runs with one seed, or runs of different settings.
    """
    teachers = {record.data: record for record in records if record.arm == "teacher"}
    groups = []
    for data, student in sorted({(r.data, r.student) for r in records if r.arm not in TAKEN}):
        mine = [r for r in records if (r.data, r.student) == (data, student) and r.arm not in TAKEN]
        names = sorted({record.arm for record in mine}, key=lambda name: (_place(name, order), name))
        arms = []
        for name in names:
            runs = tuple(sorted((record for record in mine if record.arm == name), key=lambda record: record.seed))
            if len({run.seed for run in runs}) < len(runs) or len({(run.epochs, run.settings) for run in runs}) > 1:
                raise StudyError(
                    f"{data}, {student}, {name}: runs with equal seeds, or with different epochs or settings; collect "
                    "anew."
                )
            arms.append(Arm(name, runs[0].epochs, runs))
        base = next((arm for arm in arms if arm.name == baseline), None)
        groups.append(Group(data, student, tuple(arms), base, teachers.get(data)))
    return groups


def markdown(study: dict[str, Any], groups: Sequence[Group], name: str) -> str:
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
        for split in group.splits():
            lines += [f"## {group.data}, {group.student}: {split}", "", *_main_table(group, split), ""]
            lines += _compute_note(group, split, study.get("compute", {}))
            lines += _subject_table(group, split, study.get("subject", SUBJECT))
            lines += _class_table(group, split)
            lines += [f"![{group.data}, {group.student}, {split}]({picture(group, split)})", ""]
        lines += [_batch_note(group), ""] if _batch_note(group) else []
    return "\n".join(lines).rstrip() + "\n"


def picture(group: Group, split: str) -> str:
    """File name of a group's plot."""
    return f"{group.data}-{group.student}-{split}.png"


def write_tables(folder: Path) -> str:
    """Write ``tables.md`` and the plots into a folder of collected results; returns the Markdown."""
    from fgd_hooks.study.plots import draw_group

    study, records = read_records(folder)
    groups = group_records(records, study.get("arms", ()), study.get("baseline", "alone"))
    text = markdown(study, groups, folder.name)
    (folder / "tables.md").write_text(text, encoding="utf-8")
    for group in groups:
        for split in group.splits():
            draw_group(group, split, folder / picture(group, split))
    return text


def _place(name: str, order: Sequence[str]) -> int:
    return list(order).index(name) if name in order else len(order)


def _main_table(group: Group, split: str) -> list[str]:
    headings = ("arm", "epochs", "seeds", "mAP50-95", "difference", "95 % interval", "gap", "CPU")
    rows = []
    for arm in group.arms:
        values = arm.values(split)
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
                "" if gain is None else interval_text(gain) + _pairs(gain, len(values)),
                "" if closed is None else f"{100 * closed:.0f} %",
                "" if cost is None else f"{cost:.2f}",
            )
        )
    value = group.teacher.value(split) if group.teacher else None
    if group.teacher is not None and value is not None:
        epochs = str(group.teacher.epochs or "")
        rows.append((f"teacher ({group.teacher.student})", epochs, "", f"{value:.1f}", "", "", "", ""))
    return markdown_table(headings, rows)


def _pairs(gain: Interval, runs: int) -> str:
    """How many seeds a difference rests on, where that is not all that the row shows."""
    return "" if gain.count == runs else f" ({gain.count} of {runs} seeds)"


def _compute_note(group: Group, split: str, compute: Mapping[str, str]) -> list[str]:
    """What the arms that were to cost as much as another one did cost; nothing where there is none."""
    arms = {arm.name: arm for arm in group.arms if arm.values(split)}
    parts = []
    for name, other in compute.items():
        ratio = cost_ratio(arms[name], arms[other]) if name in arms and other in arms else None
        if ratio is not None:
            parts.append(f"`{name}` {ratio:.2f} of `{other}`")
    return [f"CPU seconds of arms of equal compute: {', '.join(parts)}.", ""] if parts else []


def interval_text(gain: Interval) -> str:
    """``+0.7 .. +5.1``; ``one seed`` where there is no interval."""
    return "one seed" if gain.half is None else f"{gain.low:+.1f} .. {gain.high:+.1f}"


def _subject_table(group: Group, split: str, subject: str) -> list[str]:
    """One arm less each of the others, seed by seed; nothing where that adds nothing to the main table."""
    mine = next((arm for arm in group.arms if arm.name == subject), None)
    rows = []
    for arm in group.arms:
        if mine is None or arm is mine or arm is group.baseline:
            continue
        if (gain := group.gain(mine, split, arm)) is not None:
            rows.append((arm.name, str(gain.count), f"{gain.mean:+.1f}", interval_text(gain)))
    return [*markdown_table((f"`{subject}` less", "seeds", "difference", "95 % interval"), rows), ""] if rows else []


def _class_table(group: Group, split: str) -> list[str]:
    """Mean AP of each class by arm; nothing for a single class, or for more than a table holds."""
    found = [run.results[split]["per_class"] for arm in group.arms for run in arm.runs if split in run.results]
    names = [entry["name"] for entry in found[0]]
    if not 1 < len(names) <= MAX_CLASSES:
        return []
    rows = []
    for arm in group.arms:
        runs = [run for run in arm.runs if split in run.results]
        cells = [arm.name]
        for name in names:
            entries = [entry for run in runs for entry in run.results[split]["per_class"] if entry["name"] == name]
            values = [100 * entry["map50_95"] for entry in entries if entry["map50_95"] is not None]
            cells.append(f"{statistics.fmean(values):.1f}" if values else "-")
        if runs:
            rows.append(cells)
    return [*markdown_table(("mAP50-95 by class", *names), rows), ""]


def _batch_note(group: Group) -> str:
    """Whether all arms of as many epochs were fed the same batches; nothing where that was not recorded."""
    if group.baseline is None or any(run.batches is None for arm in group.arms for run in arm.runs):
        return ""
    base = {run.seed: run.batches for run in group.baseline.runs}
    same = [arm for arm in group.arms if arm.epochs == group.baseline.epochs and arm is not group.baseline]
    pairs = {arm.name: [(run.batches, base[run.seed]) for run in arm.runs if run.seed in base] for arm in same}
    other = [name for name, found in pairs.items() if any(mine != theirs for mine, theirs in found)]
    if other:
        return f"Not fed the same batches as `{group.baseline.name}`: {', '.join(other)}."
    unknown = [name for name, found in pairs.items() if not found]
    if unknown or not pairs:
        return f"Batches not compared, for want of a common seed: {', '.join(unknown)}." if unknown else ""
    return "All arms of equal epochs were fed the same batches, pixel by pixel (compared by checksum)."
