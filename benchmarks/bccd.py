"""The BCCD study behind docs/results/bccd.md, in three steps.

    python benchmarks/bccd.py run --data BCCD --arm fgd --student yolo26n.yaml --seed 0 --teacher TEACHER.pt --out RUNS
    python benchmarks/bccd.py collect --data BCCD --out RUNS
    python benchmarks/bccd.py table

``run`` trains one student of one arm with one seed; every run has the same settings. A run that is finished is skipped,
so a queue of runs can be repeated after an interruption. ``collect`` measures the last weights (the EMA) of all
finished runs on val and test with pycocotools and copies numbers and logs to docs/results/bccd. ``table`` rebuilds the
table from there, without data or weights. BCCD is the folder of the data set, with data_nopath.yaml inside.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "bccd"
ARMS = ("alone", "builtin", "fgd")

SETTINGS: dict[str, object] = {
    "imgsz": 192,
    "batch": 8,
    "nbs": 8,
    "optimizer": "AdamW",
    "lr0": 1e-3,
    "lrf": 1e-2,
    "warmup_epochs": 1,
    "weight_decay": 5e-4,
    "amp": False,
    "mosaic": 0.0,
    "mixup": 0.0,
    "erasing": 0.0,
    "auto_augment": None,
    "fliplr": 0.5,
    "flipud": 0.5,
    "hsv_h": 0.01,
    "hsv_s": 0.3,
    "hsv_v": 0.2,
    "translate": 0.1,
    "scale": 0.25,
    "close_mosaic": 0,
    "workers": 0,
    "device": "cpu",
    "plots": False,
    "val": False,
    "pretrained": False,
    "deterministic": True,
    "patience": 0,
}


def run(arguments: argparse.Namespace) -> None:
    """Train and evaluate one student; skip when its summary is already there."""
    tag = f"-{arguments.tag}" if arguments.tag else ""
    name = f"{Path(arguments.student).stem}-{arguments.arm}{tag}-e{arguments.epochs}-s{arguments.seed}"
    summary_file = arguments.out / name / "summary.json"
    if summary_file.exists():
        print(f"{summary_file} exists: skipped")
        return

    import torch
    from ultralytics import YOLO

    torch.set_num_threads(1)
    settings = dict(SETTINGS, data=str(arguments.data / "data_nopath.yaml"), epochs=arguments.epochs)
    settings.update(seed=arguments.seed, project=str(arguments.out), name=name, exist_ok=True)
    model = YOLO(str(arguments.student))
    callback = None
    if arguments.arm == "builtin":
        settings["distill_model"] = str(arguments.teacher)
    elif arguments.arm == "fgd":
        from fgd_hooks.integrations.ultralytics import FGDCallback

        callback = FGDCallback(teacher=str(arguments.teacher), overrides=arguments.set)
        callback.attach(model)

    wall, cpu = time.perf_counter(), time.process_time()
    model.train(**settings)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu

    summary = {
        "name": name,
        "student": Path(arguments.student).stem,
        "arm": arguments.arm + tag,
        "epochs": arguments.epochs,
        "seed": arguments.seed,
        "overrides": arguments.set,
        "wall_s": round(wall, 1),
        "cpu_s": round(cpu, 1),
    }
    temporary = summary_file.with_suffix(".tmp")
    temporary.write_text(json.dumps(summary, indent=1))
    os.replace(temporary, summary_file)
    print(json.dumps(summary))


def collect(arguments: argparse.Namespace) -> None:
    """Measure the finished runs that are not in docs/results/bccd yet, and copy their numbers and logs there."""
    from fgd_hooks.evaluate import evaluate

    RESULTS.mkdir(parents=True, exist_ok=True)
    data = arguments.data / "data_nopath.yaml"
    for summary_file in sorted(arguments.out.glob("*/summary.json")):
        summary = json.loads(summary_file.read_text())
        target = RESULTS / f"{summary['name']}.json"
        if target.exists():
            continue
        summary["results"] = {}
        for split in ("val", "test"):
            found = evaluate(summary_file.parent / "weights" / "last.pt", data, split=split, imgsz=192, device="cpu")
            # without the paths of the machine that ran it
            values = {key: value for key, value in found.to_dict().items() if key not in ("model", "data")}
            summary["results"][split] = values
        shutil.copy(summary_file.parent / "results.csv", target.with_suffix(".csv"))
        target.write_text(json.dumps(summary, indent=1) + "\n")
        print(summary["name"], summary["results"]["val"]["map50_95"], summary["results"]["test"]["map50_95"])


def table(arguments: argparse.Namespace) -> None:
    """Print the table of docs/results/bccd.md from the collected numbers."""
    arms: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for file in sorted(RESULTS.glob("*.json")):
        run = json.loads(file.read_text())
        arms[run["student"], run["arm"], run["epochs"]].append(run)
    classes = [entry["name"] for entry in next(iter(arms.values()))[0]["results"]["test"]["per_class"]]
    print(f"| student | arm | epochs | val mAP50-95 | test mAP50-95 | test {' / '.join(classes)} | seeds |")
    print("|---|---|---|---|---|---|---|")
    for (student, arm, epochs), runs in sorted(arms.items()):
        cells = [student, arm, str(epochs)]
        for split in ("val", "test"):
            values = [100 * run["results"][split]["map50_95"] for run in runs]
            deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            each = f" ({', '.join(f'{value:.1f}' for value in values)})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{deviation}{each}")
        rows = [[entry["map50_95"] for entry in run["results"]["test"]["per_class"]] for run in runs]
        cells.append(" / ".join(f"{100 * statistics.mean(values):.1f}" for values in zip(*rows, strict=True)))
        cells.append(", ".join(str(run["seed"]) for run in runs))
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run", help="train one student")
    one.add_argument("--arm", choices=ARMS, required=True)
    one.add_argument("--student", type=Path, required=True, help="model yaml or weights")
    one.add_argument("--teacher", type=Path, help="teacher weights, for the arms builtin and fgd")
    one.add_argument("--epochs", type=int, default=45)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--tag", default="", help="added to the name of the arm")
    one.add_argument("--set", nargs="*", default=[], help="settings of FGD, key=value")
    one.set_defaults(do=run)
    every = commands.add_parser("collect", help="measure finished runs and copy numbers and logs to docs/results/bccd")
    every.set_defaults(do=collect)
    for command in (one, every):
        command.add_argument("--data", type=Path, required=True, help="folder with data_nopath.yaml and the images")
        command.add_argument("--out", type=Path, default=Path("runs/bccd"), help="folder of the runs")
    show = commands.add_parser("table", help="print the table from docs/results/bccd")
    show.set_defaults(do=table)
    arguments = parser.parse_args()
    arguments.do(arguments)


if __name__ == "__main__":
    main()
