import dataclasses
import time

import pytest

from fgd_hooks.config import BalanceConfig, FGDConfig, ScheduleConfig, load_config, save_config
from fgd_hooks.errors import ConfigError
from fgd_hooks.utils.structured_config import known_keys


def test_defaults_yaml_dict_and_overrides_agree(tmp_path):
    file = tmp_path / "fgd.yaml"
    file.write_text("weight: 2\nbalance:\n  ratio: 1.5\nloss:\n  options: {temperature: 0.8}\n")
    from_yaml = load_config(file)
    from_dict = load_config({"weight": 2, "balance": {"ratio": 1.5}, "loss": {"options": {"temperature": 0.8}}})
    from_text = load_config(None, ["weight=2", "balance.ratio=1.5", "loss.options.temperature=0.8"])
    from_keys = load_config(None, {"weight": 2, "balance.ratio": 1.5, "loss.options": {"temperature": 0.8}})
    assert from_yaml == from_dict == from_text == from_keys
    assert from_yaml.balance.ratio == 1.5
    assert from_yaml.loss.options == {"temperature": 0.8}
    assert load_config(None) == FGDConfig()


def test_overrides_win_over_the_file(tmp_path):
    file = tmp_path / "fgd.yaml"
    file.write_text("balance: {ratio: 1.5, interval: 20}\n")
    config = load_config(file, ["balance.ratio=3"])
    assert (config.balance.ratio, config.balance.interval) == (3, 20)


def test_written_and_read_again(tmp_path):
    config = load_config(None, {"levels": ["P3", "P4"], "schedule.stop": 0.5})
    save_config(config, tmp_path / "fgd.yaml")
    assert load_config(tmp_path / "fgd.yaml") == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("balanse: {ratio: 1}", ["balanse", "'balance'"]),
        ("balance: {ratoi: 1}", ["balance.ratoi", "'balance.ratio'"]),
        ("weight: much", ["weight", "much", "float"]),
        ("weight: true", ["weight", "True"]),
        ("balance: 3", ["balance", "BalanceConfig"]),
        ("balance: {ratio: -1}", ["balance.ratio", "-1"]),
        ("balance: {ratio: .nan}", ["balance.ratio", "nan"]),
        ("balance: {mode: gradients}", ["balance.mode", "'gradient'"]),
        ("balance: {interval: 2.5}", ["balance.interval", "2.5"]),
        ("schedule: {start: 5 epochs, stop: 3epochs}", ["schedule.stop", "3epochs"]),
        ("schedule: {stop: 35}", ["schedule.stop is 35", "fraction", "12 epochs"]),
        ("schedule: {stop: 35.0}", ["schedule.stop is 35.0", "fraction"]),
        ("schedule: {start: 3 weeks}", ["schedule.start is '3 weeks'", "12 epochs"]),
        ("schedule: {stop: 0}", ["schedule.stop is 0", "more than 0"]),
        ("schedule: {stop_epoch: 0.5}", ["schedule.stop_epoch is called schedule.stop now"]),
        ("every: 2", ["every is called interval now"]),
        ("levels: P3", ["levels", "P3"]),
        ("levels: []", ["levels"]),
        ("inherit: neck,head", ["inherit", "neck,head", "neck+head"]),
        ("teacher: {dtype: fp16}", ["teacher.dtype", "fp16"]),
        ("- a\n- b", ["list"]),
        ("a: [1", ["YAML"]),
    ],
)
def test_a_mistake_names_the_file_the_key_and_the_nearest(tmp_path, text, words):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_config(file)
    assert all(word in str(raised.value) for word in ["mine.yaml", *words]), str(raised.value)


def test_mistakes_in_overrides():
    with pytest.raises(ConfigError, match=r"balance\.ratoi.*balance\.ratio"):
        load_config(None, ["balance.ratoi=1"])
    with pytest.raises(ConfigError, match="key=value"):
        load_config(None, ["balance.ratio"])
    with pytest.raises(ConfigError, match="ratio"):
        load_config(None, ["balance.ratio=high"])
    with pytest.raises(ConfigError, match="weight"):
        load_config(None, ["weight=1", "weight.x=2"])


def test_mistakes_in_python_fail_at_once_too():
    with pytest.raises(ConfigError, match=r"balance\.momentum"):
        BalanceConfig(momentum=1.0)
    with pytest.raises(ConfigError, match=r"balance\.image_limit.*1 or more, or null"):
        BalanceConfig(image_limit=0.5)
    with pytest.raises(ConfigError, match=r"schedule\.kind"):
        ScheduleConfig(kind="cosin")
    with pytest.raises(TypeError):
        FGDConfig(wieght=1)  # type: ignore[call-arg]


def test_missing_file():
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        load_config("nowhere.yaml")


def test_numbers_in_scientific_notation(tmp_path):
    assert load_config(None, ["balance.min_scale=1e-3"]).balance.min_scale == 1e-3
    assert load_config(None, ["loss.options={alpha: 1e-3}"]).loss.options == {"alpha": 1e-3}
    file = tmp_path / "fgd.yaml"
    file.write_text("balance: {min_scale: 1e-3}\nloss:\n  options:\n    alpha: 2e-3\n")
    assert load_config(file).balance.min_scale == 1e-3
    assert load_config(file).loss.options == {"alpha": 2e-3}
    assert load_config(None, ["adapter=1e5x"]).adapter == "1e5x"


def test_none_and_null_in_overrides():
    for text in ("None", "none", "null"):
        assert load_config(None, [f"schedule.stop={text}"]).schedule.stop is None


def test_a_key_given_twice():
    with pytest.raises(ConfigError, match="twice"):
        load_config(None, ["weight=1", "weight=2"])


def test_types_are_checked_in_python_and_after_a_change():
    for wrong in ({"interval": 1.5}, {"levels": "P3"}, {"weight": "much"}, {"balance": {"ratio": 1}}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            FGDConfig(**wrong)
    config = FGDConfig()
    config.balance.ratio = -1.0
    with pytest.raises(ConfigError, match=r"balance\.ratio"):
        load_config(config)


def test_a_loaded_configuration_is_a_copy():
    mine = FGDConfig()
    other = load_config(mine)
    other.weight = 5
    assert mine.weight == 1


def test_known_keys_cover_every_field():
    keys = known_keys(FGDConfig)
    assert {"weight", "balance", "balance.ratio", "schedule.stop", "teacher.dtype"} <= set(keys)
    assert len([k for k in keys if "." not in k]) == len(dataclasses.fields(FGDConfig))


def nested(depth):
    return "[" * depth + "]" * depth


LAUGHS = "\n".join(
    [
        "loss:",
        " options:",
        "  l0: &l0 [ha, ha]",
        *(f"  l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 10)),
    ]
)


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        "levels: " + nested(5000),
        "loss: {options: {a: " + nested(30) + "}}",
        "loss: {options: {" + ", ".join(f"a{n}: 1" for n in range(9999)) + "}}",
        "# " + "x" * 70_000,
        " " * 300_000,
        "loss: &a {options: *a}",
        "weight: " + "9" * 400,
        "interval: 0x" + "f" * 5000,
        "weight: !!python/object/apply:os.mkdir ['exploded']",
        "loss: {options: {1: 2}}",
        "weight: \x00",
    ],
    ids=lambda text: text[:30],
)
def test_a_malicious_file_is_refused_quickly(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    before = time.process_time()
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        load_config(file)
    assert time.process_time() - before < 10
    assert not (tmp_path / "exploded").exists()


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"weight: \xff\xfe")
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        load_config(tmp_path / "mine.yaml")


def test_endless_and_huge_values_in_python():
    circle = {}
    circle["loss"] = circle
    ring = []
    ring.append(ring)
    tree = [1]
    for _ in range(15):
        tree = [tree] * 10  # a few objects that stand for 10**15
    for values in (
        circle,
        {"loss": {"options": {"a": ring}}},
        {"loss": {"options": {"a": tree}}},
        {"weight": 10**5000},
        {"interval": -(10**400)},
        {10**5000: 1},
        {"loss.options." + "a." * 5000 + "b": 1},
        {"loss": {"options": {1: 2}}},
        3,
    ):
        with pytest.raises(ConfigError):
            load_config(values)
    for overrides in (["loss.options." + "a." * 5000 + "b=1"], ["a." * 5000 + "b=1"], [3], {"weight": 10**400}):
        with pytest.raises(ConfigError):
            load_config(None, overrides)


def test_names_that_no_file_can_have():
    for name in ("a\0b", "a" * 5000):
        with pytest.raises(FileNotFoundError):
            load_config(name)


def test_a_reference_to_the_environment_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hush")
    (tmp_path / "mine.yaml").write_text("adapter: ${oc.env:SECRET}")
    for source, overrides in (
        (tmp_path / "mine.yaml", []),
        ({"loss": {"options": {"a": ["${weight}"]}}}, []),
        (None, ["adapter=${weight}"]),
        (FGDConfig(adapter="${weight}"), []),
    ):
        with pytest.raises(ConfigError, match="reference") as raised:
            load_config(source, overrides)
        assert "hush" not in str(raised.value)


def test_a_key_of_another_section_names_the_right_one():
    with pytest.raises(ConfigError, match=r"'balance\.ratio'"):
        load_config(None, ["ratio=1"])


def test_objects_that_no_file_holds_reach_a_loss():
    assert load_config({"loss": {"options": {"reduce": max, "shape": (1, 2)}}}).loss.options["reduce"] is max
