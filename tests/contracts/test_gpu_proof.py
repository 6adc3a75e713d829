"""The prepared proof for a card runs, as far as a CPU can tell."""

import pytest
import torch

pytest.importorskip("ultralytics")

from benchmarks.gpu.proof import main


def test_the_sections_run_small(capsys):
    assert main(["--smoke", "--only", "correct", "no waiting", "loss alone"]) == 0
    printed = capsys.readouterr().out
    assert "fused, channels_last, float32" in printed
    assert "of_copy_bandwidth" in printed


@pytest.mark.slow
def test_whole_steps_run_small(capsys):
    assert main(["--smoke", "--only", "steps", "fit", "one rank"]) == 0
    assert "batch 2: ours" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so(capsys):
    assert main([]) == 1
    assert "--smoke" in capsys.readouterr().err
