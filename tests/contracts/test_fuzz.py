"""Random and damaged input: only the documented errors come out, and nothing is ever loaded by half."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fgd_hooks import Distiller
from fgd_hooks.config import FGDConfig, config_to_dict, load_config
from fgd_hooks.errors import CheckpointError, ConfigError
from fgd_hooks.utils.checkpoint import LAST_CHECKPOINT, write_checkpoint
from fgd_hooks.utils.structured_config import known_keys
from tests.helpers.tiny import TinyDetector, batch, trained

CASES = [60, pytest.param(10_000, marks=pytest.mark.slow)]


def fuzz(cases, strategy, check):
    limits = settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],  # a failure is shown as found: making it smaller takes minutes
        suppress_health_check=list(HealthCheck),
    )
    limits(given(strategy)(check))()


# configuration

NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([10**400, -(10**4000), 0, 1, 0.5]))
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.binary(max_size=3))
KEYS = st.one_of(st.sampled_from([*known_keys(FGDConfig), "ratio", "mode", "options", "name"]), st.text(max_size=6))
VALUES = st.recursive(
    PLAIN, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)), max_leaves=8
)
WORDS = [
    "P3",
    "fgd",
    "gradient",
    "1e-3",
    ".nan",
    ".inf",
    "0x" + "f" * 5000,
    "9" * 400,
    "null",
    "~",
    "yes",
    "2020-13-45",
]
WORDS += [
    "${oc.env:HOME}",
    "${",
    "???",
    "!!python/object/apply:os.system",
    "!!binary",
    "!!set",
    "&a",
    "*a",
    "<<",
    "%TAG",
]
WORDS += [
    ": ",
    "- ",
    "? ",
    "\n",
    "\n  ",
    "\n    ",
    "{",
    "}",
    "[",
    "]",
    ",",
    "#",
    "|",
    ">",
    "'",
    '"',
    "---",
    "\t",
    "\x00",
    "\x85",
]
YAML = st.lists(st.one_of(KEYS, st.sampled_from(WORDS), st.text(max_size=4)), max_size=25).map("".join)


def check_config(load):
    try:
        config = load()
    except ConfigError:
        return
    assert isinstance(config, FGDConfig)
    assert repr(load_config(config_to_dict(config))) == repr(config)


@pytest.mark.parametrize("cases", CASES)
def test_configuration_from_yaml(cases, tmp_path):
    file = tmp_path / "fgd.yaml"

    def check(text):
        file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        check_config(lambda: load_config(file))

    fuzz(cases, st.one_of(YAML, YAML, YAML, st.text(), st.binary()), check)


@pytest.mark.parametrize("cases", CASES)
def test_configuration_from_texts(cases):
    pairs = st.lists(st.one_of(st.tuples(KEYS, YAML).map("=".join), st.text(), st.integers()), max_size=4)
    fuzz(cases, pairs, lambda texts: check_config(lambda: load_config(None, texts)))


@pytest.mark.parametrize("cases", CASES)
def test_configuration_from_python(cases):
    keys = st.one_of(KEYS, KEYS, KEYS, st.integers(), st.just(10**400), st.none())
    both = st.tuples(
        st.one_of(st.dictionaries(keys, VALUES), VALUES.filter(lambda v: not isinstance(v, (str, type(None))))),
        st.dictionaries(KEYS, VALUES),
    )
    fuzz(cases, both, lambda pair: check_config(lambda: load_config(*pair)))


# side file


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A distillation in the middle of its training, and the bytes of its side file."""
    pytest.importorskip("ultralytics")
    from fgd_hooks.integrations.ultralytics.checkpoint import DistillationCheckpoint

    student, teacher = trained(TinyDetector()), trained(TinyDetector((8, 16, 24)), seed=1)
    distiller = Distiller(student, teacher=teacher, config={"adapter": "conv1x1_bn", "levels": ["P3"]})
    run = SimpleNamespace(distiller=distiller, optimizer=torch.optim.AdamW(distiller.parameters(), 1e-3))
    run.checkpoint = DistillationCheckpoint(distiller, run.optimizer)
    images, boxes = batch()
    for _ in range(3):
        loss = (student(images)["scores"] - 1).square().mean()
        (loss + distiller(images, boxes).loss).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    run.path = tmp_path_factory.mktemp("fuzz") / LAST_CHECKPOINT
    write_checkpoint(run.path, content_of(run))
    run.whole = run.path.read_bytes()
    run.content = copy.deepcopy(content_of(run))
    return run


def content_of(run):
    state = {"distiller": run.distiller.training_state(), "optimizer": run.optimizer.state_dict()}
    return {"epoch": 1, **state}


def same(one, other):
    if isinstance(one, torch.Tensor):
        return (
            one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def check_loading(run):
    """Load what lies at the path: it is refused and nothing changed, or it is loaded and the training can go on."""
    try:
        epoch = run.checkpoint.load(run.path.parent)
    except CheckpointError:
        assert same(content_of(run), run.content), "loaded by half"
        return False
    assert type(epoch) is int and epoch >= 0
    for parameter in run.distiller.parameters():
        assert bool(torch.isfinite(parameter).all())
        parameter.grad = torch.ones_like(parameter)
    run.optimizer.step()
    run.optimizer.zero_grad()
    assert all(bool(torch.isfinite(parameter).all()) for parameter in run.distiller.parameters())
    assert bool((run.distiller.balance.scales > 0).all())
    run.distiller.balance.next_step()
    run.path.write_bytes(run.whole)
    run.checkpoint.load(run.path.parent)
    return True


def test_the_whole_file_is_taken(workplace):
    workplace.path.write_bytes(workplace.whole)
    assert check_loading(workplace)


@pytest.mark.parametrize("cases", CASES)
def test_random_bytes(cases, workplace):
    def check(content):
        workplace.path.write_bytes(content)
        assert not check_loading(workplace)

    fuzz(
        cases,
        st.one_of(st.binary(), st.binary().map(lambda rest: (64).to_bytes(8, "little") + b'{"__metadata__":{' + rest)),
        check,
    )


@pytest.mark.parametrize("cases", CASES)
def test_damaged_bytes(cases, workplace):
    """Flipped bits, cuts, insertions and repetitions anywhere in a whole file."""
    size = len(workplace.whole)
    place = st.integers(0, size - 1)
    # the structure of the file is at its beginning
    flips = st.lists(
        st.tuples(st.one_of(place, st.integers(0, 9000)), st.integers(1, 255)),
        min_size=1,
        max_size=4,
    )
    cut = st.tuples(place, place, st.binary(max_size=20))

    def check(damage):
        content = bytearray(workplace.whole)
        if isinstance(damage, list):
            for where, bits in damage:
                content[where] ^= bits
        else:
            start, end, put = damage
            content[min(start, end) : max(start, end)] = put
        workplace.path.write_bytes(content)
        check_loading(workplace)

    fuzz(cases, st.one_of(flips, cut, place.map(lambda end: (end, size, b""))), check)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**30, -1, math.nan, math.inf, 1e300, "P3", [], {}, (), [[[]]]]),
    st.text(max_size=5),
    st.builds(
        lambda shape, dtype, fill: torch.full(shape, fill).to(dtype),
        st.lists(st.integers(0, 3), max_size=4),
        st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.uint8]),
        st.sampled_from([math.nan, math.inf, -1.0, 0.0, 1e30]),
    ),
    st.just(torch.ones(1).expand(1000, 1000)),
)


def paths(content, prefix=()):
    found = [prefix] if prefix else []
    if isinstance(content, (dict, list)):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in items:
            found += paths(value, (*prefix, key))
    return found


@pytest.mark.parametrize("cases", CASES)
def test_other_contents(cases, workplace):
    """Valid files in which entries are replaced, missing or added, or tensors hold something else."""
    places = st.sampled_from(paths(workplace.content))
    change = st.tuples(st.sampled_from(["replace", "remove", "add", "fill"]), places, LEAVES)

    def check(changes):
        content = copy.deepcopy(workplace.content)
        for kind, path, leaf in changes:
            place = content
            for key in path[:-1]:
                place = place[key] if isinstance(place, dict) and key in place else {}
            if not isinstance(place, dict) or path[-1] not in place:
                continue
            present = place[path[-1]]
            if kind == "remove":
                del place[path[-1]]
            elif kind == "add":
                place["other"] = leaf
            elif kind == "fill" and isinstance(present, torch.Tensor) and present.is_floating_point():
                value = leaf if isinstance(leaf, float) else math.nan
                present.view(-1)[-1:] = torch.tensor(value, dtype=torch.float64).to(present.dtype)  # 1e300: infinity
            else:
                place[path[-1]] = leaf
        write_checkpoint(workplace.path, content)
        check_loading(workplace)

    fuzz(cases, st.lists(change, min_size=1, max_size=3), check)
