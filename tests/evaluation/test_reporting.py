"""What reports share."""

import io

import pytest

from fgd_hooks.evaluation.reporting import Curve, Table, draw_curves, plain, spread


def test_spread():
    assert spread([1.0]) == "1.0"
    assert spread([1.0, 3.0, 5.0]) == "3.0 ± 2.0"
    assert spread([1.0, 2.0], digits=0) == "2 ± 1"


def test_markdown_table():
    assert Table(("a", "b"), [("x|y", "1")]).markdown() == ["| a | b |", "|---|--:|", "| x\\|y | 1 |"]


def test_curves_with_one_point_none_and_a_reference(tmp_path):
    curves = [Curve("one", [5], [[1.0], [2.0]]), Curve("none", [], []), Curve("many", [1, 2], [[1.0, 2.0]])]
    draw_curves(curves, tmp_path / "c.png", title="t", ylabel="y", reference=("teacher", 3.0))
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_square_brackets_and_colons_are_text_in_a_terminal():
    console = pytest.importorskip("rich.console").Console(width=120, record=True, file=io.StringIO())
    odd = "open[/b] [red] :smile:"
    console.print(Table((odd, "b"), [(odd, odd)], title=odd, caption=odd).rich())
    console.print(plain(odd))
    assert console.export_text().count(odd) == 6
