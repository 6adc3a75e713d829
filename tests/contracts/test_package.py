import re
import subprocess
import sys
from pathlib import Path

from fgd_hooks import load_config
from fgd_hooks.config import FGDConfig
from fgd_hooks.utils.structured_config import known_keys

ROOT = Path(__file__).parents[2]

CORE_ALONE = """
import sys
others = "ultralytics pycocotools tensorboard timm torchvision rich matplotlib"
for name in others.split():
    sys.modules[name] = None  # an import of it raises ImportError
import fgd_hooks
from tests.helpers.tiny import TinyDetector, batch, trained
student, teacher = trained(TinyDetector()), trained(TinyDetector((8, 16, 24)))
distiller = fgd_hooks.Distiller(student, teacher, fgd_hooks.FGDConfig(every=1))
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
    assert load_config(ROOT / "configs" / "yolo.yaml") == load_config()


def test_the_readmes_table_of_settings_names_existing_keys_and_their_defaults():
    text = (ROOT / "README.md").read_text()
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
    assert compared >= 10


def test_version_is_stated_once_more_in_setup_cfg():
    import configparser

    import fgd_hooks

    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    assert parser["metadata"]["version"] == fgd_hooks.__version__
