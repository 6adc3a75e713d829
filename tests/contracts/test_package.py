import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fgd_hooks import load_config
from fgd_hooks.config import FGDConfig
from fgd_hooks.errors import EXTRAS
from fgd_hooks.utils.structured_config import known_keys

ROOT = Path(__file__).parents[2]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")

CORE_ALONE = """
import sys
others = "ultralytics pycocotools tensorboard timm torchvision rich matplotlib"
for name in others.split():
    sys.modules[name] = None  # an import of it raises ImportError
import fgd_hooks
from tests.helpers.tiny import TinyDetector, batch, trained
student, teacher = trained(TinyDetector()), trained(TinyDetector((8, 16, 24)))
distiller = fgd_hooks.Distiller(student, teacher=teacher, config=fgd_hooks.FGDConfig(interval=1))
images, boxes = batch()
student(images)
distiller(images, boxes).loss.backward()
loaded = [name for name in others.split() if sys.modules.get(name)]
print("fine", loaded, sorted(set(fgd_hooks.__all__) - set(dir(fgd_hooks))))
"""


def test_the_core_needs_torch_and_omegaconf_alone():
    done = subprocess.run([sys.executable, "-c", CORE_ALONE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fine [] []"


def test_configs_yolo_spells_out_the_defaults():
    assert load_config("yolo") == load_config()


@pytest.mark.parametrize("page", ["README.md", "docs/configuration.md"])
def test_tables_of_settings_name_existing_keys_and_their_defaults(page):
    text = (ROOT / page).read_text()
    table = text[text.index("| key | default | meaning |") :].split("\n\n")[0]
    section, compared = "", 0
    for row in table.splitlines()[2:]:
        keys, defaults = re.findall(r"`([\w.]+)`", row.split("|")[1]), row.split("|")[2].split(",")
        for number, key in enumerate(keys):
            section = key.rpartition(".")[0] or section
            full = f"{section}{key}" if key.startswith(".") else key
            assert full in known_keys(FGDConfig), full
            if len(keys) == len(defaults):
                value = load_config()
                for name in full.split("."):
                    value = getattr(value, name)
                written = defaults[number].strip()
                stated = {"true": True, "false": False, "null": None}.get(written, written)
                if isinstance(stated, str) and value is not None:
                    stated = type(value)(stated)
                assert value == stated, full
                compared += 1
    assert compared >= 5


def test_a_wheel_holds_the_recipes_and_the_marker_of_types(tmp_path):
    command = ["setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(tmp_path)]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    package = tmp_path / "fgd_hooks"
    files = {file.relative_to(ROOT / "configs") for file in (ROOT / "configs").rglob("*.yaml")}
    assert {file.relative_to(package / "recipes") for file in (package / "recipes").rglob("*.yaml")} == files
    assert (package / "py.typed").is_file()
    program = "from fgd_hooks.utils.recipes import recipe_path; print(recipe_path('paper/fcos'))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", program], cwd="/", env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == str(package / "recipes" / "paper" / "fcos.yaml")


def test_every_optional_package_is_of_an_extra_that_exists():
    extras = set(SETUP["options.extras_require"])
    assert set(EXTRAS.values()) <= extras
    assert {"ultralytics", "torchvision", "timm", "eval", "tensorboard", "study", "test", "docs", "dev"} <= extras


def test_the_core_depends_on_torch_and_omegaconf_alone():
    core = SETUP["options"]["install_requires"]
    assert re.findall(r"^([\w-]+)", core, re.M) == ["torch", "omegaconf"]


def test_every_source_file_that_a_page_names_is_there():
    named = re.compile(r"\b(?:tests|fgd_hooks|trainers|benchmarks|results)/[\w/]+\.py\b")
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        missing = {name for name in named.findall(page.read_text(encoding="utf-8")) if not (ROOT / name).is_file()}
        assert not missing, f"{page.name} names {missing}"
