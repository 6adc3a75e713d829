"""The hook that shows results/ on the site."""

from types import SimpleNamespace

import pytest

pytest.importorskip("mkdocs")

from fgd_hooks.study.tables import heading, read_comparisons
from results import pages
from results.pages import RESULTS


@pytest.mark.parametrize(
    ("place", "link", "expected"),
    [
        ("study.md", "../results/bccd/tables.md", "results/bccd/tables.md"),
        ("results/README.md", "../docs/performance.md", "../performance.md"),
        ("results/bccd/README.md", "../../docs/defaults.md#a", "../../defaults.md#a"),
        ("results/bccd/README.md", "../few_labels/tables.md", "../few_labels/tables.md"),
    ],
)
def test_links_lead_where_the_site_has_the_page(place, link, expected):
    page = SimpleNamespace(file=SimpleNamespace(src_uri=place))
    assert pages.on_page_markdown(f"see [it]({link}).", page=page, config=None, files=None) == f"see [it]({expected})."


def test_every_section_of_a_study_gets_its_picture(monkeypatch):
    monkeypatch.setattr(pages, "draw_group", lambda group, split, file: file.write(b"drawn"))
    monkeypatch.setattr(pages, "_pictures", {})
    config = SimpleNamespace(site_dir="site", use_directory_urls=True, plugins=SimpleNamespace(_current_plugin="x"))
    files = pages.on_files([], config)
    names = {file.src_uri for file in files}
    assert {"results/README.md", "results/taps/tables.md", "results/teachers.jsonl"} <= names
    assert not any(name.endswith(".py") for name in names)
    page = SimpleNamespace(file=SimpleNamespace(src_uri="results/taps/tables.md"))
    text = pages.on_page_markdown((RESULTS / "taps" / "tables.md").read_text("utf-8"), page=page)
    for group in read_comparisons(RESULTS / "taps")[1]:
        for split in group.splits:
            shown = f"results/taps/bccd-10-yolo26-half-{split}.png"
            assert f"{heading(group, split)}\n\n![bccd-10, yolo26-half, {split}]({shown[13:]})\n" in text
            assert shown in names
