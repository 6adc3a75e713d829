"""A hook of mkdocs: the site shows this folder beside ``docs/``, and each study's pictures, drawn from its records.

Links are written for a reader of the repository; the pages of ``docs/`` lie at the site's root.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from fgd_hooks.study.plots import draw_group, picture
from fgd_hooks.study.records import STUDY
from fgd_hooks.study.tables import heading, read_comparisons

RESULTS = Path(__file__).parent

_pictures: dict[str, bytes] = {}
"""By their place in the site: drawn once, however often ``mkdocs serve`` builds."""

_below: dict[str, dict[str, str]] = {}
"""Place of a page -> line of a heading -> the picture that belongs below it."""


def on_files(files: Files, config: Any) -> Files:
    """Add the files and the pictures."""
    for file in sorted(RESULTS.rglob("*")):
        if file.is_file() and file.suffix not in (".py", ".pyc"):
            place = f"results/{file.relative_to(RESULTS).as_posix()}"
            files.append(File.generated(config, place, abs_src_path=str(file)))
    for study in sorted(RESULTS.glob(f"*/{STUDY}")):
        headings = _below.setdefault(f"results/{study.parent.name}/tables.md", {})
        for group in read_comparisons(study.parent)[1]:
            for split in group.splits:
                name = picture(group, split)
                headings[heading(group, split)] = f"![{group.data}, {group.student}, {split}]({name})"
                place = f"results/{study.parent.name}/{name}"
                if place not in _pictures:
                    draw_group(group, split, drawn := io.BytesIO())
                    _pictures[place] = drawn.getvalue()
                files.append(File.generated(config, place, content=_pictures[place]))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the pictures below their headings, and let the links between the two folders lead where the site has them."""
    place = page.file.src_uri
    for line, shown in _below.get(place, {}).items():
        markdown = markdown.replace(f"{line}\n", f"{line}\n\n{shown}\n")
    if place.startswith("results/"):
        return re.sub(r"(\]\((?:\.\./)+)docs/", r"\1", markdown)
    return markdown.replace("](../results/", "](results/")
