"""Study files: every mistake is named with its place, and the studies of the repository are sound."""

from __future__ import annotations

from pathlib import Path

import pytest

from fgd_hooks.config import load_config
from fgd_hooks.errors import StudyError
from fgd_hooks.study.spec import SETTINGS, load_study
from tests.helpers.studies import make_study

STUDIES = sorted((Path(__file__).parents[2] / "configs" / "studies").glob("*.yaml"))
DATA = {"a": {"yaml": "set/data.yaml", "teacher": {"weights": "t.pt"}}}


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_the_studies_of_the_repository(file):
    spec = load_study(file)
    assert spec.name == file.stem
    assert spec.arms[spec.baseline].kind == "alone"
    assert spec.about
    assert "/work" not in file.read_text() and "/root" not in file.read_text()
    # same budget and augmentation for all arms: none changes the host's settings or, but for equal compute, the epochs
    assert all(not arm.train and arm.epochs is None for arm in spec.arms.values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sedes": [1]}, "no key sedes. Did you mean 'seeds'"),
        (
            {"data": {"a": {"yaml": "x", "teacher": {"wieghts": "t"}}}},
            "data.a.teacher.wieghts. Did you mean 'data.a.teacher.weights'",
        ),
        ({"arms": {"x": {"kind": "fdg"}}}, "arms.x.kind is 'fdg'. Did you mean 'fgd'"),
        ({"arms": {"x": {"fgd": {"balance": {"ration": 2}}}}}, "arms.x.fgd.*balance.ration.*'balance.ratio'"),
        ({"fgd": {"balance": {"ration": 2}}}, "fgd: .*balance.ration.*'balance.ratio'"),
        ({"fgd": {"loss": {"name": "cwd"}}, "arms": {"x": {"fgd": {"losses": ["fgd"]}}}}, "arms.x.fgd: .*Both loss"),
        ({"arms": {"x": {"fgd": {"loss": {"name": "fgdd"}}}}}, "arms.x.fgd.*'fgdd'"),
        ({"arms": {"x": {"kind": "alone", "fgd": {"weight": 2}}}}, "arms.x.fgd has no effect with kind alone"),
        ({"arms": {"teacher": {"kind": "alone"}}}, "the name is taken"),
        ({"arms": {"x": {"kind": "alone", "compute": "y"}}}, "arms.x.compute is no arm"),
        ({"arms": {"x": {"kind": "alone", "train": {"seed": 3}}}}, "arms.x.train.seed is set by the study itself"),
        ({"arms": {"x": {"kind": "alone", "data": ["b"]}}}, "there is no data set 'b'"),
        ({"arms": {}}, "arms is empty"),
        (
            {"data": {"a": {"yaml": "x", "teacher": {"model": "m.yaml", "train": {"epochs": 9}}}}},
            "data.a.teacher.train.epochs is set by the study itself",
        ),
        ({"data": {"a": {"yaml": "x", "teacher": {"model": "m.yaml", "epochs": 0}}}}, "data.a.teacher.epochs is 0"),
        ({"data": {}}, "data is empty"),
        ({"data": {"a": {"teacher": {"weights": "t"}}}}, "data.a needs either yaml or scenes"),
        ({"data": {"a": {"yaml": "x"}}}, "arms.fgd needs data.a.teacher"),
        ({"data": {"a": {"yaml": "x", "teacher": {"epochs": 3}}}}, "needs weights, or a model to train"),
        ({"data": {"a": {**DATA["a"], "fraction": 0}}}, "data.a.fraction is 0"),
        ({"seeds": [1, 1]}, "seeds is .*different numbers"),
        ({"plugins": ["none.py"]}, "none.py' does not exist; expected a Python file"),
        ({"epochs": "many"}, "epochs"),
        ({"name": "a/b"}, "expected a folder's name"),
        ({"student": {"pretrain": {"data": "b"}}}, "no data set 'b'"),
        ({"student": {"pretrain": {"data": "a", "epochs": 0}}}, "student.pretrain.epochs is 0"),
        ({"student": {"scale": [0.5]}}, "student.scale is .*expected three numbers"),
        ({"data": {"a": {**DATA["a"], "teacher": {"model": "m.yaml", "scale": [1, 2]}}}}, "data.a.teacher.scale is"),
        ({"data": {"a": {**DATA["a"], "student": {"scale": [1, 0, 8]}}}}, "data.a.student.scale is"),
        ({"data": {"a": {**DATA["a"], "epochs": 0}}}, "data.a.epochs is 0"),
        ({"data": {"a/b": DATA["a"]}}, "data.a/b: expected letters"),
        ({"arms": {"w/o": {"kind": "alone"}}}, "arms.w/o: expected letters"),
        ({"arms": {"pretrain": {"kind": "alone"}}}, "arms.pretrain: the name is taken"),
        ({"arms": {"alone": {"kind": "alone", "data": []}}}, "arms.alone.data is empty"),
        ({"baseline": "allone"}, "baseline is 'allone', which is no arm. Did you mean 'alone'"),
        (
            {"data": {"a": DATA["a"], "a-b": DATA["a"]}, "arms": {"alone": {"kind": "alone"}, "b-alone": {}}},
            "both called 'a-b-alone' in two ways",
        ),
        (
            {
                "data": {"a": DATA["a"], "b": {"yaml": "x"}},
                "arms": {
                    "alone": {"kind": "alone"},
                    "fgd": {"data": ["a"]},
                    "same": {"kind": "alone", "compute": "fgd"},
                },
            },
            "arms.same.compute: fgd has no run on b",
        ),
    ],
)
def test_mistakes(tmp_path, changes, said):
    with pytest.raises(StudyError, match=said):
        load_study(make_study(tmp_path, **{"data": DATA, **changes}))


def test_a_missing_file_and_no_yaml(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_study(tmp_path / "nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(StudyError, match="bad.yaml"):
        load_study(tmp_path / "bad.yaml")


def test_a_plugin_registers_what_the_study_names(tmp_path):
    plugin = "from fgd_hooks import register_loss\nfrom fgd_hooks.losses.imitation import ImitationLoss\n\n\n"
    (tmp_path / "mine.py").write_text(f"{plugin}@register_loss('of_a_plugin')\nclass Mine(ImitationLoss):\n    pass\n")
    arms = {"alone": {"kind": "alone"}, "x": {"fgd": {"loss": {"name": "of_a_plugin"}}}}
    with pytest.raises(StudyError, match="of_a_plugin"):
        load_study(make_study(tmp_path, data=DATA, arms=arms))
    for _ in range(2):  # once a process
        spec = load_study(make_study(tmp_path, data=DATA, arms=arms, plugins=["mine.py"]))
    assert spec.plugins == [str(tmp_path / "mine.py")]
    (tmp_path / "mine.py").write_text("1 / 0")
    with pytest.raises(StudyError, match="mine.py' fails: ZeroDivisionError"):
        load_study(make_study(tmp_path, data=DATA, arms=arms, plugins=["mine.py"]))


def test_a_set_for_pretraining_alone_needs_no_teacher(tmp_path):
    data = {**DATA, "b": {"yaml": "x", "compare": False}}
    assert not load_study(make_study(tmp_path, data=data)).data["b"].compare


def test_dotted_settings_are_what_a_training_takes(tmp_path):
    arms = {"alone": {"kind": "alone"}, "x": {"fgd": {"balance.ratio": 2.0}}}
    spec = load_study(make_study(tmp_path, data=DATA, arms=arms, fgd={"balance": {"interval": 20}}))
    config = load_config(spec.arms["x"].fgd)  # as FGDCallback reads it
    assert (config.balance.ratio, config.balance.interval) == (2.0, 20)


def test_settings_of_all_arms_are_merged_into_each(tmp_path):
    arms = {"alone": {"kind": "alone"}, "fgd": {}, "x": {"fgd": {"balance": {"ratio": 2}, "inherit": "auto"}}}
    common = {"inherit": None, "balance": {"interval": 20}}
    spec = load_study(make_study(tmp_path, data=DATA, arms=arms, fgd=common))
    assert spec.arms["fgd"].fgd == common
    assert spec.arms["x"].fgd == {"inherit": "auto", "balance": {"interval": 20, "ratio": 2}}
    assert spec.arms["alone"].fgd == {}


def test_common_settings_validate_after_the_last_epoch_only():
    assert SETTINGS["val"] is False and SETTINGS["patience"] == 0
