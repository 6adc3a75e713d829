import copy
import io
import pickle
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from torch import nn

from fgd_hooks.errors import TapError
from fgd_hooks.taps.hooks import FeatureTaps, run_until_tapped, scrub
from fgd_hooks.taps.tap import Tap, expand_taps
from fgd_hooks.utils.modules import unwrap
from tests.helpers.tiny import TinyDetector, batch


@pytest.mark.parametrize(
    ("text", "tap"),
    [
        ("neck.out.1", Tap("neck.out.1")),
        ("model.23:input[1]", Tap("model.23", "input", (1,))),
        ("backbone:output[pool][-1]", Tap("backbone", "output", ("pool", -1))),
        ("backbone['0']", Tap("backbone", "output", ("0",))),
        ("backbone[0]", Tap("backbone", "output", (0,))),
        ("neck.*", Tap("neck.*")),
    ],
)
def test_parse(text, tap):
    assert Tap.parse(text) == tap


def test_text_form_reads_back():
    for tap in (Tap("a.b"), Tap("a", "input", (2,)), Tap("a", "output", ("x", 1)), Tap("a", "output", ("0",))):
        assert Tap.parse(str(tap)) == tap


@pytest.mark.parametrize("text", ["a:outptu", "a[1", "a[]", "a:input:output"])
def test_parse_refuses_what_it_cannot_read(text):
    with pytest.raises(TapError, match="cannot be read"):
        Tap.parse(text)


def test_typo_names_the_nearest_modules():
    with pytest.raises(TapError, match=r"neck.ot.1.*names no module.*neck\.out\.1"):
        expand_taps(TinyDetector(), ["neck.ot.1"])


def test_glob_expands_in_order_of_definition():
    taps = expand_taps(TinyDetector(), ["neck.out.*", "stem"])
    assert [tap.module for tap in taps] == ["neck.out.0", "neck.out.1", "neck.out.2", "stem"]


def test_captures_outputs_and_inputs():
    model = TinyDetector().eval()
    images, _ = batch()
    seen = {}
    model.neck.register_forward_hook(lambda m, a, out: seen.update(out=out))
    with FeatureTaps(model, [Tap("head", "input", (2,)), Tap("neck", "output", (0,))]) as taps:
        model(images)
        features = taps.pop()
    assert features[0] is seen["out"][2]
    assert features[1] is seen["out"][0]


def test_dict_and_tuple_outputs():
    class Odd(nn.Module):
        def forward(self, x):
            return OrderedDict(maps=(x, x * 2), name="text")

    with FeatureTaps(Odd(), [Tap("", "output", ("maps", 1))]) as taps:
        model = Odd()
        taps.detach()
        taps = FeatureTaps(model, [Tap("", "output", ("maps", 1))])
        x = torch.ones(1, 2, 3, 3)
        model(x)
        assert torch.equal(taps.pop()[0], x * 2)


def test_pop_forgets():
    model = TinyDetector()
    taps = FeatureTaps(model, [Tap("neck.out.0")])
    model(batch()[0])
    taps.pop()
    with pytest.raises(TapError, match=r"neck\.out\.0.*did not fire"):
        taps.pop()


def test_one_that_did_not_fire_is_named():
    model = TinyDetector()
    model.unused = nn.Conv2d(1, 1, 1)
    taps = FeatureTaps(model, [Tap("stem"), Tap("unused")], role="student")
    model(batch()[0])
    with pytest.raises(TapError, match=r"student's tap\(s\) unused did not fire"):
        taps.pop()


@pytest.mark.parametrize(
    ("tap", "saw"),
    [
        (Tap("head"), r"a dict with the keys \['scores'\]"),
        (Tap("head", "output", ("scores",)), r"a tensor of shape \(2, 5, 84\)"),
        (Tap("neck"), "a list of 3"),
        (Tap("neck", "output", (7,)), r"no entry \[7\]"),
    ],
)
def test_unusable_value_says_what_was_seen(tap, saw):
    model = TinyDetector()
    with FeatureTaps(model, [tap]), pytest.raises(TapError, match=saw):
        model(batch()[0])


def test_grad_only_ignores_validation():
    model = TinyDetector()
    taps = FeatureTaps(model, [Tap("stem")], grad_only=True)
    with torch.no_grad():
        model(batch()[0])
    with pytest.raises(TapError, match="with gradients enabled"):
        taps.pop()
    model(batch()[0])
    assert taps.pop()[0].requires_grad


def test_early_exit_skips_what_comes_after_the_last_tap():
    model = TinyDetector()
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append("head"))
    taps = FeatureTaps(model, [Tap("neck.out.2"), Tap("stem")], stop=True)
    features = run_until_tapped(model, taps, batch()[0])
    assert calls == []
    assert [tuple(f.shape) for f in features] == [(2, 16, 2, 2), (2, 8, 8, 8)]
    taps.detach()
    model(batch()[0])
    assert calls == ["head"]


def test_early_exit_passes_through_a_model_that_catches_exceptions():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            try:
                return self.inner(x)
            except Exception:
                return None

    model = Careful()
    taps = FeatureTaps(model, [Tap("inner")], stop=True)
    assert run_until_tapped(model, taps, torch.ones(1, 3, 2, 2))[0].shape == (1, 4, 2, 2)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_detach_leaves_no_hook_also_after_an_exception():
    model = TinyDetector()
    with pytest.raises(ZeroDivisionError), FeatureTaps(model, [Tap("stem"), Tap("head", "input", (0,))]):
        assert hooks(model) == 2
        raise ZeroDivisionError
    assert hooks(model) == 0


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_a_tapped_model_is_clean(how):
    model = TinyDetector()
    taps = FeatureTaps(model, [Tap("stem"), Tap("head", "input", (0,))])
    images, _ = batch()
    model.eval()(images)  # features with a graph are held by the taps now
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    captured = taps.pop()
    twin(images)
    with pytest.raises(TapError):
        taps.pop()
    assert torch.equal(twin(images)["scores"], model(images)["scores"])
    assert captured
    assert scrub(twin) == 2
    assert hooks(twin) == 0
    assert hooks(model) == 2, "the original is still tapped"


def test_a_pickled_model_needs_no_fgd_hooks(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 1, 1))
    taps = FeatureTaps(model, [Tap("0"), Tap("0", "input")])
    buffer = io.BytesIO()
    torch.save(model, buffer)
    taps.detach()
    (tmp_path / "model.pt").write_bytes(buffer.getvalue())
    code = (
        "import sys, torch; sys.modules['fgd_hooks'] = None; "
        "m = torch.load('model.pt', weights_only=False); print(m(torch.ones(1, 1, 2, 2)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 1, 2, 2])" in done.stdout


def test_unwrap_looks_through_wrappers():
    model = TinyDetector()
    assert unwrap(nn.DataParallel(model)) is model
    assert unwrap(torch.compile(model)) is model
