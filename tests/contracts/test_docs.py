"""The examples in README and docs run.

The blocks of a page run in order: Python in one namespace, of the shell blocks the lines that begin with ``fgd``. The
files they name (yolo26n.pt, yolo26s.pt, coco8.yaml, configs/) lie in the working directory as tiny stand-ins; student,
teacher and the rest of a loop are tiny, too. What does not run:

- a block after ``<!-- not run: reason -->``;
- shell lines of other programs (pip, pytest, ...), and ``fgd quickstart``, which has tests of its own.

Every training is made short: ``epochs=...`` becomes one epoch of tiny images.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("ultralytics")

from fgd_hooks.adapters import ADAPTERS
from fgd_hooks.cli.main import main
from fgd_hooks.losses.base import LOSSES
from tests.conftest import SETTINGS
from tests.helpers.tiny import TinyDetector, batch, trained

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?P<skip><!-- not run: .+ -->\n)?^(?P<indent> *)```(?P<kind>\w+)\n(?P<text>.*?)^ *```$", re.M | re.S
)
SHORT = {key: SETTINGS[key] for key in ("imgsz", "batch", "plots", "workers", "device", "amp", "mosaic")}


def blocks(page):
    """Kind and text of each block that runs."""
    for found in BLOCK.finditer(page.read_text(encoding="utf-8")):
        if not found["skip"]:
            yield found["kind"], re.sub(f"^{found['indent']}", "", found["text"], flags=re.M)


def commands(kind, text):
    """The arguments of each ``fgd`` line."""
    prompt = "$ " if kind == "console" else ""
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith(f"{prompt}fgd ") and "quickstart" not in line:
            yield shlex.split(line.removeprefix(prompt), comments=True)[1:]


@pytest.fixture
def place(tmp_path, monkeypatch, teacher_file, student_yaml, data):
    """A working directory with the files that the examples name."""
    from ultralytics import YOLO

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    student = YOLO(str(student_yaml))
    student.model.args["imgsz"] = SETTINGS["imgsz"]
    student.model.names = YOLO(str(teacher_file)).names
    student.save("yolo26n.pt")
    shutil.copy(teacher_file, "yolo26s.pt")
    Path("coco8.yaml").write_text(yaml.safe_dump({**yaml.safe_load(data.read_text()), "path": str(data.parent)}))
    shutil.copytree(ROOT / "configs", "configs")
    return tmp_path


@pytest.fixture
def namespace():
    """What an example takes for granted."""
    student, teacher = trained(TinyDetector()), trained(TinyDetector((8, 16, 24)), seed=1)
    loader = [(*batch(step), torch.zeros(2)) for step in range(2)]
    return {
        "student": student,
        "teacher": teacher,
        "optimizer": torch.optim.SGD(student.parameters(), 1e-3),
        "criterion": lambda output, targets: output["scores"].square().mean() + targets.sum(),
        "loader": loader,
        "images": loader[0][0],
        "boxes": loader[0][1],
        "targets": loader[0][2],
        "epochs": 2,
    }


@pytest.mark.parametrize("page", [page for page in PAGES if list(blocks(page))], ids=lambda page: page.stem)
def test_the_examples_of_a_page_run(page, place, namespace, capfd, caplog, monkeypatch):
    for registry in (LOSSES, ADAPTERS):  # a page may register one of its own
        monkeypatch.setattr(registry, "_factories", dict(registry._factories))
    short = namespace["short"] = {**SHORT, "project": str(place / "runs" / "detect")}
    for kind, text in blocks(page):
        if kind == "python":
            exec(re.sub(r"\bepochs=\d+", "epochs=1, **short", text), namespace)
        for arguments in commands(kind, text):
            if arguments[0] in ("train", "doctor"):
                kept = [argument for argument in arguments if not argument.startswith(("epochs=", "imgsz="))]
                arguments = [*kept, "epochs=1", *(f"{key}={value}" for key, value in short.items())]
            expected = (0, 1) if arguments[0] == "doctor" else (0,)  # 1: it found something to mend, in tiny models
            assert main(arguments) in expected, (arguments, capfd.readouterr().err)
            if kind == "console":
                printed = capfd.readouterr()
                for line in text.splitlines()[1:]:
                    assert line in printed.out + caplog.text, "the page shows what the command prints"


def test_the_pages_hold_examples():
    kinds = [kind for page in PAGES for kind, _ in blocks(page)]
    assert kinds.count("python") >= 5
    assert sum(len(list(commands(kind, text))) for page in PAGES for kind, text in blocks(page)) >= 10


@pytest.mark.parametrize(
    "page",
    [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "results").rglob("*.md"))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_what_a_page_links_to_exists(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:|#", target)]
    assert [target for target in targets if not (page.parent / target.split("#")[0]).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_rows_of_a_table_have_the_cells_of_its_heading(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", lambda found: found[0].replace("|", "/"), page.read_text("utf-8"), flags=re.S)
    heading = 0
    for line in map(str.strip, text.splitlines()):
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert not (heading and cells) or cells == heading, line
        heading = cells
