"""The three kinds of detector on BCCD behind results/detectors/README.md, in three steps.

    python benchmarks/detectors.py run --data BCCD --out RUNS
    python benchmarks/detectors.py collect --out RUNS
    python benchmarks/detectors.py table

``run`` trains, one after another, the teacher of each kind and its student in every arm, three seeds each, by the
recipes of configs/; a run that is finished is skipped. ``collect`` takes log and metrics of what is finished over to
results/detectors, ``table`` rebuilds the page's table from there. BCCD is the folder of the data set.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from fgd_hooks.study.records import read_curves, read_log, read_runs, write_records

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "detectors"
KINDS = {
    "retinanet": "RetinaNet (anchor-based)",
    "fcos": "FCOS (anchor-free)",
    "fasterrcnn": "Faster R-CNN (two-stage)",
}
ARMS = {
    "teacher": "the teacher, 15 epochs",
    "alone": "the student alone, 10 epochs",
    "fgd": "the student with FGD, 10 epochs",
    "fgd_m05": "the same with balance.momentum=0.5",
    "fgd_fitted": "the same with the adapter fitted, and more measurements at the start",
    "alone_e20": "the student alone, 20 epochs",
    "alone_scratch": "from random weights, alone, 20 epochs",
    "fgd_scratch": "from random weights, with FGD, 20 epochs",
    "teacher_again": "the teacher once more, on another machine",
    "alone_again": "the student alone once more, 10 epochs",
    "auto": "the defaults since then: neck and head fitted to the teacher, FGD, 10 epochs",
    "whole": "the same with inherit=fitted: the backbone, too, 10 epochs",
    "whole_start": "that start alone (fgd.weight=0), 10 epochs",
}
LONGER = ["epochs=20"]
SCRATCH = [*LONGER, "model.pretrained=false", "model.frozen=[]"]
EARLIER = ["fgd.adapter=conv1x1", "fgd.balance.momentum=0.9"]
"""Defaults of the time when these were run; the steps that measure were others then, too."""
SEEDS = (0, 1, 2)
SPLITS = ("val", "test")
PAGE = RESULTS / "README.md"
BEGIN, END = "<!-- table -->\n", "\n<!-- end of table -->"
TEACHER_EPOCHS = 15


def planned() -> Iterator[tuple[str, str, int]]:
    """Kind, arm and seed of each run, teachers first."""
    yield from ((kind, "teacher", 0) for kind in KINDS)
    yield from ((kind, arm, seed) for seed in SEEDS for kind in KINDS for arm in ARMS if arm != "teacher")


def run(data: Path, out: Path) -> None:
    """Train what is not there yet."""
    for kind, arm, seed in planned():
        folder = out / f"{kind}-{arm}-s{seed}"
        if (folder / "eval-test.json").exists():
            continue
        teacher = out / f"{kind}-teacher-s0" / "model.pt"
        taught = [f"teacher.checkpoint={teacher}"]
        own = {
            "teacher": ["train=teacher", f"epochs={TEACHER_EPOCHS}"],
            "alone": ["train=alone"],
            "fgd": [*taught, *EARLIER],
            "fgd_m05": [*taught, "fgd.adapter=conv1x1"],
            "fgd_fitted": taught,
            "alone_e20": ["train=alone", *LONGER],
            "alone_scratch": ["train=alone", *SCRATCH],
            "fgd_scratch": [*taught, *EARLIER, *SCRATCH],
            "teacher_again": ["train=teacher", f"epochs={TEACHER_EPOCHS}"],
            "alone_again": ["train=alone"],
            "auto": taught,
            "whole": [*taught, "fgd.inherit=fitted"],
            "whole_start": [*taught, "fgd.inherit=fitted", "fgd.weight=0"],
        }[arm]
        own += ["resume=true"] if (folder / "last.pt").exists() else []
        program = [
            sys.executable,
            str(ROOT / "trainers" / "timm_detector.py"),
            f"{ROOT}/configs/detectors/bccd-{kind}.yaml",
        ]
        subprocess.run([*program, f"data.root={data}", f"out={folder}", f"seed={seed}", *own], check=True)


def collect(out: Path) -> None:
    """Take over the log and the metrics of each finished run."""
    runs, curves = read_runs(RESULTS), read_curves(RESULTS)
    for kind, arm, seed in planned():
        folder = out / f"{kind}-{arm}-s{seed}"
        if not (folder / "eval-test.json").exists():
            print(f"{folder.name}: not finished")
            continue
        metrics = {split: json.loads((folder / f"eval-{split}.json").read_text(encoding="utf-8")) for split in SPLITS}
        runs[folder.name] = {"name": folder.name, "kind": kind, "arm": arm, "seed": seed, "results": metrics}
        curves[folder.name] = read_log(folder / "results.csv")
    write_records(RESULTS, runs, curves)


def table() -> str:
    """The table of the page: per cent, mean and the seeds themselves."""
    lines = ["| detector | arm | val mAP50-95 | val mAP50 | test mAP50-95 | test mAP50 |", "|---|---|---|---|---|---|"]
    every = read_runs(RESULTS).values()
    for kind, title in KINDS.items():
        for arm, label in ARMS.items():
            runs = [run["results"] for run in every if (run["kind"], run["arm"]) == (kind, arm)]
            if runs:
                values = [[100 * one[split][key] for one in runs] for split in SPLITS for key in ("map50_95", "map50")]
                lines.append(f"| {title} | {label} | {' | '.join(map(_cell, values))} |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"**{statistics.mean(values):.1f}** ({', '.join(f'{value:.1f}' for value in values)})"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("run", "collect", "table"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.step == "run":
        run(arguments.data.resolve(), arguments.out.resolve())
    elif arguments.step == "collect":
        collect(arguments.out)
    else:
        text = PAGE.read_text(encoding="utf-8")
        before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
        PAGE.write_text(f"{before}\n{table()}\n{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
