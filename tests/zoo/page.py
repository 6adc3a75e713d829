"""docs/compatibility.md: the zoo's table, from the lines that its test wrote.

FGD_ZOO_OUT=zoo.jsonl pytest -m '' tests/zoo && python -m tests.zoo.page zoo.jsonl
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
DISTRIBUTIONS = {"segmentation_models_pytorch": "segmentation-models-pytorch"}
INTRODUCTION = """# Which models it works on

Each row was run by `tests/zoo`: the model was built small or with random weights, its levels were found without
any tap being named and compared with those that reading its code gives, and the probe left it bit-equal. "Trains"
means that a pair of such models was then distilled for three steps, that the neck (or the named part) got a gradient,
that the teacher stayed bit-equal and that no hook was left. "Levels only" means that the levels are right and that
nobody has trained it here. Accuracy was measured for none of these rows; [results](../results/README.md) has what was.

| package | model | levels (channels) | first tap | trains | levels only |
|---|---|---|---|---|---|
"""
END = """
Not in the table is not tried. A model whose levels cannot be told gives an error that lists maps which would do;
name them with `student_taps` and `teacher_taps`. `fgd levels NAME` shows what is found for a model of yours, and
`pip install "fgd-hooks[zoo]"` brings the packages of this table. mmdet was run with `mmcv-lite`, without its compiled
part. Detectors of torchvision are seen from behind their transform: train them with
[`TorchvisionDistiller`](torchvision.md). Pairs of YOLO versions: [families](yolo-families.md).
"""


def installed(package: str) -> str:
    """The name and version of a package."""
    try:
        return f"{package} {version(DISTRIBUTIONS.get(package, package))}"
    except PackageNotFoundError:
        return package


def main(file: str) -> None:
    """Write the page."""
    rows = []
    for line in Path(file).read_text().splitlines():
        entry = json.loads(line)
        levels = ", ".join(f"{name} ({channels})" for name, channels, _ in entry["levels"])
        signs = ("yes", "") if entry["trains"] else ("", "yes")
        tap = entry["levels"][0][2]
        rows.append(f"| {installed(entry['package'])} | {entry['model']} | {levels} | `{tap}` | {' | '.join(signs)} |")
    PAGE.write_text(INTRODUCTION + "\n".join(rows) + "\n" + END, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
