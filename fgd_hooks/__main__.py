"""``python -m fgd_hooks`` is the command ``fgd``."""

import runpy

runpy.run_module("fgd_hooks.cli.main", run_name="__main__")
