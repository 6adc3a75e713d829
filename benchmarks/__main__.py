"""All benchmarks: ``python -m benchmarks [--quick]``.

Runs benchmarks.loss, .step, .teacher and .growth, each in a process of its own, prints their tables and writes
results/benchmarks/*.json (``--quick``: small settings that show that everything runs; nothing is written). Compiled
students take minutes more: ``python -m benchmarks --only compiled``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from benchmarks.common import RESULTS, machine

QUICK = {"loss": ["--rounds", "2", "--sets", "yolo192", "--size", "20"]}
FULL = {"loss": ["--json", str(RESULTS / "loss.json")]}


def main() -> int:
    """Returns the number of benchmarks that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="*", choices=("loss", "step", "teacher", "growth", "compiled"))
    options = parser.parse_args()
    print(", ".join(f"{key} {value}" for key, value in machine().items()), flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "YOLO_AUTOINSTALL": "false"}
    failed = 0
    for name in options.only or ("loss", "step", "teacher", "growth"):
        arguments = QUICK.get(name, ["--quick"]) if options.quick else FULL.get(name, [])
        command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
        failed += subprocess.run(command, env=environment).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
