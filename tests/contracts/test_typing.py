"""What type checkers and editors know of the public names."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SNIPPET = """
from torch import Tensor, nn, rand
from typing_extensions import assert_type

from fgd_hooks import Distiller, FGDConfig, load_config
from fgd_hooks.distilled import Distilled
from fgd_hooks.integrations.torchvision import TorchvisionDistiller


def loop(student: nn.Module, teacher: nn.Module) -> None:
    with Distiller(student, teacher=[teacher], config=load_config("yolo")) as distiller:
        distilled = distiller(rand(1, 3, 64, 64), [rand(2, 4)], canvas=(64, 64))
        assert_type(distilled, Distilled)
        assert_type(distilled.loss, Tensor)
        assert_type(distiller.config, FGDConfig)
        distiller(rand(1, 3, 64, 64))
    with TorchvisionDistiller(student, teacher=teacher) as host:
        assert_type(host(), Distilled)
        host(wrong=1)
"""


@pytest.mark.slow
def test_the_result_of_a_distiller_has_its_type(tmp_path):
    pytest.importorskip("mypy")
    file = tmp_path / "snippet.py"
    file.write_text(SNIPPET)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "pyproject.toml", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    errors = [line.partition("error: ")[2] for line in done.stdout.splitlines() if "error: " in line]
    assert errors == [
        "Too few arguments  [call-arg]",
        'Unexpected keyword argument "wrong"  [call-arg]',
    ], done.stdout + done.stderr
