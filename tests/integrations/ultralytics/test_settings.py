"""The callback's keywords, its description, and what its import brings along."""

import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, get_type_hints

import pytest

pytest.importorskip("ultralytics")

from torch import nn
from ultralytics import YOLO

from fgd_hooks import FGDCallback, FGDConfig
from fgd_hooks.config import config_to_dict
from fgd_hooks.integrations.ultralytics.settings import FGDSettings, differences, named_config


def test_the_keywords_are_the_fields_of_the_configuration():
    """All but the section ``teacher``: that keyword is the teacher itself."""
    fields = {name: kind for name, kind in get_type_hints(FGDConfig).items() if name in FGDConfig.__dataclass_fields__}
    sections = {name: Mapping[str, Any] for name, kind in fields.items() if dataclasses.is_dataclass(kind)}
    assert fields.pop("teacher")
    assert get_type_hints(FGDSettings) == {**fields, **{name: sections[name] for name in sections if name in fields}}
    assert not FGDSettings.__required_keys__


def test_every_keyword_is_taken():
    defaults = config_to_dict(FGDConfig())
    keywords = {name: defaults[name] for name in get_type_hints(FGDSettings)}
    assert FGDCallback("t.pt", **keywords).config == FGDConfig()


def test_repr_says_teacher_changes_and_whether_it_is_attached(teacher_file, student_yaml):
    assert repr(FGDCallback("t.pt")) == "<FGDCallback teacher='t.pt': not attached>"
    callback = FGDCallback(teacher_file, weight=2.0, balance={"ratio": 0.5}, schedule={"stop": None})
    settings = f"teacher='{teacher_file}', weight=2.0, balance.ratio=0.5, schedule.stop=None"
    assert repr(callback) == f"<FGDCallback {settings}: not attached>"
    yolo = YOLO(str(student_yaml))
    callback.attach(yolo)
    assert repr(callback) == f"<FGDCallback {settings}: attached>"
    callback.detach(yolo)
    assert repr(callback).endswith(": not attached>")
    several = FGDCallback([nn.Identity(), "t.pt"], teachers=[{"weight": 0.5}, {}])
    assert repr(several).startswith("<FGDCallback teacher=['Identity', 't.pt'], teachers=[{'name': None, 'weight': 0.5")


def test_differences_are_by_dotted_key():
    other = FGDConfig(weight=2.0)
    other.balance.ratio = 0.5
    assert differences(FGDConfig(), other) == {"weight": (1.0, 2.0), "balance.ratio": (1.0, 0.5)}
    assert differences(other, other) == {}


def test_the_teachers_name():
    config = FGDConfig()
    assert named_config(config, "a/b.pt").teacher.name == "a/b.pt"
    assert named_config(config, nn.Identity()).teacher.name == "Identity"
    assert config.teacher.name is None, "the callback's own configuration is not changed"


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_import_brings_nothing_that_only_draws_or_logs():
    done = python(
        "import sys, fgd_hooks.integrations.ultralytics.callback\n"
        "print([name for name in ('matplotlib', 'rich', 'tensorboard') if name in sys.modules])"
    )
    assert done.stdout == "[]\n", done.stderr


def test_without_ultralytics_one_line_names_the_command():
    done = python("import sys; sys.modules['ultralytics'] = None\nfrom fgd_hooks import FGDCallback")
    last = done.stderr.strip().splitlines()[-1]
    assert "package ultralytics is not installed" in last
    assert last.endswith('pip install "fgd-hooks[ultralytics]"')
