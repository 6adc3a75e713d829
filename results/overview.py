"""Rebuild every page here that follows from records: ``python results/overview.py``.

Each study's ``tables.md`` from its ``runs.jsonl``, and ``README.md``: in one table what the default gains on each data
set and split against each arm that it should beat, and all studies. With nothing new collected, nothing changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fgd_hooks.errors import StudyError
from fgd_hooks.evaluation.arms import Arm, Comparison, Record
from fgd_hooks.evaluation.reporting import Table, spread
from fgd_hooks.evaluation.runs import flat
from fgd_hooks.study.records import STUDY, read_runs
from fgd_hooks.study.tables import SUBJECT, markdown, read_comparisons

RESULTS = Path(__file__).parent
ACROSS = ("bccd", "few_labels", "long", "long_teacher", "pretrained", "raccoon", "scenes")
"""Studies of the present default; the others are searches, knobs and parts."""

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

INTRODUCTION = (
    "mAP50-95 by pycocotools of the last weights, per cent: mean ± standard deviation over the seeds. Less ...: "
    f"the mean of what `{SUBJECT}` has more with the same seed, and its 95 % t-interval. Gap: the difference to the "
    "student alone as a share of what the teacher is above it. CPU: seconds of the training as a multiple of those "
    "of the student alone, on one kind of processor. The start alone is without a teacher in the training, "
    "copied with `inherit=channels`, fitted with `inherit=fitted`."
)

FORMAT = """\
## All studies

A folder each: `study.json` says what was asked, `runs.jsonl` has a line for each run (settings, figures by split, class
and size, seconds, versions), `curves.csv.gz` the epochs of all logs, `tables.md` what follows from them.
"""

OTHERS = """\
## Other figures

- [BCCD: what the runs are and what they show](bccd/README.md)
- [RetinaNet, FCOS and Faster R-CNN on BCCD](detectors/README.md), by `trainers/timm_detector.py`
- [Quickstart](quickstart/report.md), and [the same on another day](quickstart/another-day.csv)
- `benchmarks/`: what `python -m benchmarks` and `benchmarks.compatibility` measured ([costs](../docs/performance.md),
  [pairs of models](../docs/pairs.md))
- `gradients/`: where FGD's gradient comes from, inside a training (`python -m benchmarks.gradients`;
  [what follows](../docs/defaults.md))
- [teachers.jsonl](teachers.jsonl): `fgd eval` of the studies' teachers on val and on their own training images

This page and every `tables.md` are rebuilt from the records by `python results/overview.py`, one study's tables and
pictures by `fgd study results/STUDY --table`; neither is edited by hand."""


def gains(folders: Sequence[Path]) -> list[str]:
    """The lines of the tables across studies.

    Raises:
        FileNotFoundError, StudyError: a folder holds no results, see
            :func:`fgd_hooks.study.tables.read_comparisons`.
        StudyError: no folder has a run of the arm ``fgd``.
    """
    groups = [group for folder in folders for group in read_comparisons(folder)[1]]
    found = [(group, subject) for group in groups if (subject := group.arm(SUBJECT))]
    splits = [(*each, split) for each in found for split in each[0].splits if each[0].values(each[1], split)]
    if not splits:
        raise StudyError(f"None of {', '.join(map(str, folders))} has a run of the arm {SUBJECT!r}.")
    what = ("data", "student", "split")
    columns = (*what, "seeds", "alone", f"`{SUBJECT}`", "teacher", "gap", "CPU", "settings")
    lines = [*Table(columns, [_gain_row(*each) for each in splits]).markdown(), ""]
    columns = (*what, *(f"less {text}" for text in RIVALS.values()))
    lines += [*Table(columns, [_difference_row(*each) for each in splits]).markdown(), ""]
    if costs := [row for each in found for row in _cost_rows(*each)]:
        columns = ("data", "student", "arm", "epochs", f"epochs of `{SUBJECT}`", f"CPU of `{SUBJECT}`, times the arm's")
        lines += ["What the arms of the same compute had and took:", "", *Table(columns, costs).markdown(), ""]
    return lines


def _gain_row(group: Comparison, subject: Arm[Record], split: str) -> tuple[str, ...]:
    mine = group.values(subject, split)
    alone = group.values(group.baseline, split) if group.baseline else {}
    teacher = group.teacher.value(split) if group.teacher else None
    closed, cost = group.closed(subject, split), group.cost(subject)
    return (
        group.data,
        group.student,
        split,
        str(len(mine)),
        spread(list(alone.values())),
        spread(list(mine.values())),
        "-" if teacher is None else f"{teacher:.1f}",
        "-" if closed is None else f"{100 * closed:.0f} %",
        "-" if cost is None else f"{cost:.2f}",
        _settings(subject),
    )


def _settings(subject: Arm[Record]) -> str:
    """How the arm's distillation was set where it was not left to the defaults: an earlier default, say."""
    fgd = flat(subject.runs[0].kept.get("fgd") or {}, prefix="")
    shown = [f"`{key}={'null' if value is None else value}`" for key, value in sorted(fgd.items())]
    return ", ".join(shown) or "defaults"


def _difference_row(group: Comparison, subject: Arm[Record], split: str) -> tuple[str, ...]:
    rivals = [group.arm(name) for name in RIVALS]
    found = [rival and group.gain(subject, split, rival) for rival in rivals]
    return (group.data, group.student, split, *(f"{gain.mean:+.1f} ({gain})" if gain else "-" for gain in found))


def _cost_rows(group: Comparison, subject: Arm[Record]) -> list[tuple[str, ...]]:
    """What the arms of equal compute were given, which was fixed before they ran."""
    rows = []
    for arm in [arm for name in RIVALS if name.endswith("same_compute") and (arm := group.arm(name))]:
        cost = group.cost(subject, arm)
        epochs = (str(arm.epochs), str(subject.epochs))
        rows.append((group.data, group.student, arm.name, *epochs, "-" if cost is None else f"{cost:.2f}"))
    return rows


def studies(folders: Sequence[Path]) -> list[str]:
    """The lines of the list of studies."""
    rows = []
    for folder in folders:
        study, groups = read_comparisons(folder)
        data = ", ".join(dict.fromkeys(group.data for group in groups))
        rows.append((f"[{study['name']}]({folder.name}/tables.md)", data, str(len(read_runs(folder)))))
    return Table(("study", "data", "runs"), rows).markdown()


def page(root: Path = RESULTS) -> str:
    """``README.md``."""
    lines = ["# What the default gains, on every set and regime that was tried", "", INTRODUCTION, ""]
    lines += gains([root / name for name in ACROSS])
    lines += ["From: " + ", ".join(f"[{name}]({name}/tables.md)" for name in ACROSS) + ".", "", FORMAT]
    lines += [*studies(sorted(file.parent for file in root.glob(f"*/{STUDY}"))), "", OTHERS]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write what has changed."""
    pages = {RESULTS / "README.md": page()}
    for folder in sorted(file.parent for file in RESULTS.glob(f"*/{STUDY}")):
        pages[folder / "tables.md"] = markdown(*read_comparisons(folder), folder.name)
    for file, text in pages.items():
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
            print(f"rebuilt {file}")


if __name__ == "__main__":
    main()
