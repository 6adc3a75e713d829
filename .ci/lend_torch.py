"""Lend the torch of this environment to another one, so that it is not installed again (three minutes, 5 GB).

    python .ci/lend_torch.py FOLDER ENVIRONMENT

FOLDER gets links to torch and to what it depends on, and nothing else; ENVIRONMENT a .pth file that names FOLDER. Pip
finds torch installed there, and does not remove it, since it lies outside of the environment.
"""

import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement


def closure(text: str, found: dict[str, Distribution]) -> dict[str, Distribution]:
    """All distributions that a requirement needs, by name; with extras, as in ``cuda-toolkit[cublas]``."""
    wanted = Requirement(text)
    if text not in found:
        found[text] = distribution(wanted.name)
        for needed in found[text].requires or []:
            marker = Requirement(needed).marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)):
                closure(needed, found)
    return found


folder, environment = map(Path, sys.argv[1:])
folder.mkdir(parents=True, exist_ok=True)
for each in closure("torch", {}).values():
    for name in {file.parts[0] for file in each.files or []} - {"..", "__pycache__"}:
        if not (link := folder / name).is_symlink():
            link.symlink_to(Path(str(each.locate_file(name))))
(place,) = environment.glob("lib/python*/site-packages")
(place / "torch.pth").write_text(f"{folder.resolve()}\n")
