"""The layer between OmegaConf and any dataclass; what is FGDConfig's own is in tests/test_config.py."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from typing import Any

import pytest
from omegaconf import MISSING

from fgd_hooks.config import FGDConfig, load_config
from fgd_hooks.errors import ConfigError
from fgd_hooks.utils.structured_config import MAX_TEXT, known_keys, load, read_yaml


@dataclass
class Part:
    name: str = MISSING
    scale: list[float] | None = None
    rate: float = 1.0

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ConfigError(f"rate is {self.rate}; expected 0 or more.")


@dataclass
class Whole:
    seed: int = 0
    quick: bool = False
    part: Part = field(default_factory=lambda: Part("own"))
    other: Part | None = None
    parts: dict[str, Part] = field(default_factory=dict)
    row: list[Part] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


def test_sections_everywhere(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "part: {rate: 2}\nother: {name: o}\nparts: {x: {name: one, scale: [1, 2e-1]}}\n"
        "row: [{name: r}]\noptions: {a.b: [1]}\n"
    )
    whole = load(Whole, tmp_path / "a.yaml", ["parts.x.rate=3", "other.scale=[0.5]", "seed=7", "part.name=new"])
    assert whole == Whole(
        seed=7,
        part=Part("new", None, 2.0),
        other=Part("o", [0.5]),
        parts={"x": Part("one", [1.0, 0.2], 3.0)},
        row=[Part("r")],
        options={"a.b": [1]},
    )
    assert type(whole.parts["x"].scale) is list and type(whole.options) is dict, "nothing of OmegaConf's is left"
    assert load(Whole, whole, {"other": None}).other is None
    assert whole.other is not None, "the source is not changed"


def test_a_text_that_is_a_number_is_one():
    assert load(Whole, {"seed": "3", "part": {"rate": "2"}, "quick": "yes"}) == Whole(3, True, Part("own", None, 2.0))
    assert load(Whole, None, ["part.name=1"]).part.name == "1"


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        ({"part": {"nam": 1}}, [], r"configuration: there is no key part\.nam\. Did you mean 'part\.name'"),
        ({"parts": {"x": {"scael": 1}}}, [], r"there is no key parts\.x\.scael\. Did you mean 'parts\.x\.scale'"),
        ({"row": [{"nmae": 1}]}, [], r"there is no key nmae\. Did you mean 'name'"),
        (None, ["other.raet=1"], r"overrides: there is no key other\.raet\. Did you mean 'other\.rate'"),
        (None, ["rate=1"], r"there is no key rate\. Did you mean .*'part\.rate'"),
        ({"seed": 1.5}, [], r"configuration: seed is 1\.5; expected int"),
        ({"seed": True}, [], "seed is True; expected int"),
        ({"seed": None}, [], "seed: .*None"),
        ({"part": {"scale": 3}}, [], r"part\.scale is 3; expected list\[float\] \| None"),
        ({"part": {"scale": ["a"]}}, [], r"part\.scale\[0\].*'a'"),
        ({"part": 3}, [], "part: .*int is not a subclass of Part"),
        ({"parts": {"x": 3}}, [], r"parts\.x: .*int is not a subclass of Part"),
        ({"other": {}}, [], r"other\.name.*missing"),
        ({"part": {"rate": -1}}, ["seed=1"], r"configuration, overrides: rate is -1\.0; expected 0 or more"),
        ([1], [], r"configuration is \[1\]; expected keys and values"),
        (None, ["seed=[1"], r"The override 'seed=\[1' cannot be read"),
        (None, ["seed=" + "1" * MAX_TEXT + "1"], f"longer than {MAX_TEXT}"),
        (None, ["options.a=&x 1"], None),
        (None, ["options.a=[&x 1, *x]"], "aliases"),
        (None, ["options.a=!!python/name:os.system"], "tags"),
        ({"options": {"a": "${seed}"}}, [], "is a reference"),
        (None, ["options.a={b: 1, b: 2}"], "duplicate key"),
    ],
)
def test_what_is_refused(source, overrides, message):
    if message is None:
        load(Whole, source, overrides)
        return
    with pytest.raises(ConfigError, match=message) as raised:
        load(Whole, source, overrides)
    assert "\n" not in str(raised.value)


def test_what_a_source_is_called():
    with pytest.raises(ConfigError, match=r"^row\[3\]: there is no key nme\. Did you mean 'name'\?$"):
        load(Part, {"nme": 1}, name="row[3]")


def test_known_keys():
    assert known_keys(Part, "part.") == ["part.name", "part.scale", "part.rate"]
    assert [key for key in known_keys(Whole) if key.startswith("part.")] == known_keys(Part, "part.")


def test_an_empty_file_and_one_of_another_kind(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("# nothing\n")
    assert read_yaml(file) == {}
    for text in ("3", "just a text", "- a"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"a\.yaml holds a (int|str|list); expected keys and values"):
            read_yaml(file)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_yaml(tmp_path)


def test_a_configuration_is_a_plain_dataclass():
    config = load_config({"losses": ["fgd", {"name": "cwd", "weight": 0.5}], "balance.ratio": 2})
    assert type(config) is FGDConfig and type(config.losses) is list
    assert pickle.loads(pickle.dumps(config)) == config
