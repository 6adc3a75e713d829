"""The wheel takes the recipes of configs/ along, as fgd_hooks/recipes; all else is in setup.cfg."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """An editable install finds configs/ where it is (fgd_hooks/utils/recipes.py)."""

    def run(self) -> None:
        """Copy the folder after the modules."""
        super().run()
        if not self.editable_mode:
            recipes = Path(self.build_lib, "fgd_hooks", "recipes")
            shutil.rmtree(recipes, ignore_errors=True)
            shutil.copytree("configs", recipes, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildWithRecipes})
