"""Recipes: the settings files of ``configs/``, which travel with the library and are found by name from anywhere."""

from __future__ import annotations

import os
from pathlib import Path

from fgd_hooks.utils.registry import suggestion

PACKAGE = Path(__file__).parents[1]


def recipes_folder() -> Path:
    """Where the recipes are: inside an installed package, or ``configs/`` of a clone."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def recipes() -> dict[str, Path]:
    """Name (``yolo``, ``paper/fcos``) to file; without studies and models, which are no settings of a distillation."""
    root = recipes_folder()
    names = {file.relative_to(root).with_suffix("").as_posix(): file for file in sorted(root.rglob("*.yaml"))}
    return {name: file for name, file in names.items() if not name.startswith(("studies/", "models/"))}


def recipe_path(name: str | Path) -> Path:
    """The file that a configuration is read from.

    Args:
        name: of a file, or without its ending of a recipe; a file of that name goes first.

    Raises:
        FileNotFoundError: neither a file nor a recipe; the message names the nearest recipes.
    """
    text = str(name)
    if os.path.isfile(text) or text.endswith((".yaml", ".yml")):
        return Path(text)
    known = recipes()
    if text not in known:
        raise FileNotFoundError(
            f"The configuration file {text!r} does not exist, nor a recipe of that name. {suggestion(text, known)}"
        )
    return known[text]
