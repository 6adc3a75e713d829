"""BCCD study: one arm, one seed, one run (see docs/results/bccd.md for the table it feeds).

    python benchmarks/bccd.py run --data DATA_DIR --arm fgd --student yolo26-half.yaml --epochs 45 --seed 0 \
        --teacher TEACHER.pt --out runs/bccd

Every run trains one student under the same settings, evaluates `last.pt` (the EMA weights) on val and on test with
pycocotools, and leaves `<out>/<name>/summary.json`, beside Ultralytics' results.csv and args.yaml. A run whose
summary exists is skipped, so a queue of runs can be repeated after an interruption.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

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

    last = arguments.out / name / "weights" / "last.pt"
    results = {}
    for split in ("val", "test"):
        metrics = YOLO(str(last)).val(
            data=settings["data"], split=split, imgsz=192, batch=8, device="cpu", plots=False, verbose=False
        )
        results[split] = {
            "map50_95": float(metrics.box.map),
            "map50": float(metrics.box.map50),
            "per_class": [float(x) for x in metrics.box.maps],
        }
    summary = {
        "name": name,
        "student": Path(arguments.student).stem,
        "arm": arguments.arm + tag,
        "epochs": arguments.epochs,
        "seed": arguments.seed,
        "overrides": arguments.set,
        "wall_s": round(wall, 1),
        "cpu_s": round(cpu, 1),
        "results": results,
    }
    temporary = summary_file.with_suffix(".tmp")
    temporary.write_text(json.dumps(summary, indent=1))
    os.replace(temporary, summary_file)
    print(json.dumps(summary))


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with data_nopath.yaml and the images")
    parser.add_argument("--arm", choices=ARMS, required=True)
    parser.add_argument("--student", type=Path, required=True, help="model yaml or weights")
    parser.add_argument("--teacher", type=Path, help="teacher weights, for the arms builtin and fgd")
    parser.add_argument("--epochs", type=int, default=45)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tag", default="", help="added to the name of the arm")
    parser.add_argument("--out", type=Path, default=Path("runs/bccd"))
    parser.add_argument("--set", nargs="*", default=[], help="configuration of FGD, key=value")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
