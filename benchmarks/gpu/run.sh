#!/usr/bin/env bash
# Proves or refutes on one card, in at most eight minutes, what docs/performance.md could only count on a CPU:
#   benchmarks/gpu/run.sh            writes results/benchmarks/gpu.json and prints a table
#   benchmarks/gpu/run.sh --smoke    small, on a CPU if there is no card; shows that it runs, writes nothing
set -euo pipefail
cd "$(dirname "$0")/../.."
YOLO_AUTOINSTALL=false exec "${PYTHON:-python}" -m benchmarks.gpu.proof "$@"
