#!/usr/bin/env bash
# The tests under the oldest and under the newest versions that are supported, each in an environment of its own.
#   tests/versions.sh [folder for the environments, default .versions]      (several GB, some minutes of installing)
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.versions}

run() { # name, packages...
    local name=$1
    shift
    python3 -m venv "$folder/$name"
    "$folder/$name/bin/pip" install --quiet "$@" -e ".[test]"
    "$folder/$name/bin/pip" freeze | grep -i -E "^(torch|torchvision|ultralytics|numpy)=="
    "$folder/$name/bin/python" -m pytest
}

run oldest "torch==2.4.1" "torchvision==0.19.1" "numpy<2" "ultralytics==8.4.177"
run newest torch ultralytics
