from pathlib import Path

import pytest
from torch import nn

pytest.importorskip("ultralytics")

import ultralytics

from fgd_hooks import FGDCallback
from fgd_hooks.errors import VersionError
from fgd_hooks.integrations.ultralytics.compat import OLDEST, check_version


@pytest.mark.parametrize("version", ["8.3.200", "8.4.100", "8.4.176", "7.9.999"])
def test_an_old_version_is_refused_before_anything_is_attached(monkeypatch, version):
    monkeypatch.setattr(ultralytics, "__version__", version)
    with pytest.raises(VersionError, match=rf"{OLDEST} or newer; found {version}.*pip install -U ultralytics"):
        FGDCallback(nn.Conv2d(3, 3, 1)).attach(type("Trainer", (), {"add_callback": print, "callbacks": {}})())


@pytest.mark.parametrize("version", [OLDEST, "8.4.190", "8.5.0", "9.0.0rc1"])
def test_a_new_version_is_accepted(monkeypatch, version):
    monkeypatch.setattr(ultralytics, "__version__", version)
    check_version()


def test_the_extra_asks_for_the_same_version():
    assert f"\n    ultralytics>={OLDEST}\n" in (Path(__file__).parents[3] / "setup.cfg").read_text(encoding="utf-8")
