"""One table across studies: what the default gains on each data set and split, against each arm that it should beat."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fgd_hooks.errors import StudyError
from fgd_hooks.evaluation.arms import Arm, Comparison, Record, compare_arms
from fgd_hooks.evaluation.reporting import Table, spread
from fgd_hooks.evaluation.runs import flat
from fgd_hooks.study.tables import SUBJECT, read_records

RIVALS = {
    "alone": "the student alone",
    "alone_same_compute": "alone, same compute",
    "builtin": "the built-in distillation",
    "start": "the copied start alone",
    "start_same_compute": "the copied start alone, same compute",
    "fitted_start": "the fitted start alone",
    "fitted_start_same_compute": "the fitted start alone, same compute",
}
"""Arms that the default is compared with, by name; a study that lacks one leaves the cell empty."""

SAME_COMPUTE = tuple(name for name in RIVALS if name.endswith("same_compute"))

INTRODUCTION = (
    "mAP50-95 by pycocotools of the last weights, per cent: mean ± standard deviation over the seeds. Less ...: "
    f"the mean of what `{SUBJECT}` has more with the same seed, and its 95 % t-interval. Gap: the difference to the "
    "student alone as a share of what the teacher is above it. CPU: seconds of the training as a multiple of those "
    "of the student alone, on one kind of processor. The start alone is without a teacher in the training, "
    "copied with `inherit=channels`, fitted with `inherit=fitted`."
)


def write_overview(folders: Sequence[Path], file: Path) -> str:
    """Write the overview of several folders of collected results as Markdown; returns it.

    Raises:
        FileNotFoundError, StudyError: a folder holds no results, see :func:`fgd_hooks.study.tables.read_records`.
        StudyError: no folder has a run of the arm ``fgd``.
    """
    gains: list[tuple[str, ...]] = []
    differences: list[tuple[str, ...]] = []
    costs: dict[tuple[str, ...], None] = {}
    sources: dict[str, None] = {}
    for folder in folders:
        study, records = read_records(folder)
        for group in compare_arms(records, study.get("arms", ())):
            arms = {arm.name: arm for arm in group.arms}
            for split in group.splits:
                if SUBJECT in arms and group.values(arms[SUBJECT], split):
                    gains.append(_gain_row(group, arms[SUBJECT], split))
                    differences.append(_difference_row(group, arms, split))
                    costs.update(_cost_row(group, arms))
                    sources[f"[{folder.name}]({folder.name}/tables.md)"] = None
    what = ("data", "student", "split")
    lines = [
        "# What the default gains, on every set and regime that was tried",
        "",
        INTRODUCTION,
        "",
        *Table((*what, "seeds", "alone", f"`{SUBJECT}`", "teacher", "gap", "CPU", "settings"), gains).markdown(),
        "",
        *Table((*what, *(f"less {text}" for text in RIVALS.values())), differences).markdown(),
        "",
        *_costs(list(costs)),
        "From: " + ", ".join(sources) + ".",
    ]
    if not gains:
        raise StudyError(f"None of {', '.join(map(str, folders))} has a run of the arm {SUBJECT!r}.")
    text = "\n".join(lines) + "\n"
    file.write_text(text, encoding="utf-8")
    return text


def _costs(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """What the arms of equal compute were given, which was fixed before they ran."""
    if not rows:
        return []
    heading = ("data", "student", "arm", "epochs", f"epochs of `{SUBJECT}`", f"CPU of `{SUBJECT}`, times the arm's")
    return ["What the arms of the same compute had and took:", "", *Table(heading, rows).markdown(), ""]


def _cost_row(group: Comparison, arms: dict[str, Arm[Record]]) -> dict[tuple[str, ...], None]:
    rows: dict[tuple[str, ...], None] = {}
    mine = arms[SUBJECT]
    for name in SAME_COMPUTE:
        if name in arms:
            ratio = group.cost(mine, arms[name])
            cost = "-" if ratio is None else f"{ratio:.2f}"
            rows[(group.data, group.student, name, str(arms[name].epochs), str(mine.epochs), cost)] = None
    return rows


def _gain_row(group: Comparison, subject: Arm[Record], split: str) -> tuple[str, ...]:
    mine = group.values(subject, split)
    alone = list(group.values(group.baseline, split).values()) if group.baseline else []
    teacher = group.teacher.value(split) if group.teacher else None
    closed, cost = group.closed(subject, split), group.cost(subject)
    return (
        group.data,
        group.student,
        split,
        str(len(mine)),
        spread(alone),
        spread(list(mine.values())),
        "-" if teacher is None else f"{teacher:.1f}",
        "-" if closed is None else f"{100 * closed:.0f} %",
        "-" if cost is None else f"{cost:.2f}",
        _settings(subject),
    )


def _settings(subject: Arm[Record]) -> str:
    """How the arm's distillation was set where it was not left to the defaults: an earlier default, say."""
    fgd = json.loads(subject.runs[0].settings or "[null, null]")[1] or {}
    shown = [f"`{key}={'null' if value is None else value}`" for key, value in flat(fgd, prefix="").items()]
    return ", ".join(shown) or "defaults"


def _difference_row(group: Comparison, arms: dict[str, Arm[Record]], split: str) -> tuple[str, ...]:
    cells = []
    for rival in RIVALS:
        gain = group.gain(arms[SUBJECT], split, arms[rival]) if rival in arms else None
        cells.append("-" if gain is None else f"{gain.mean:+.1f} ({gain})")
    return (group.data, group.student, split, *cells)
