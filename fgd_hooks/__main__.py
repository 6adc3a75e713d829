"""``python -m fgd_hooks`` is the command ``fgd``."""

import sys

from fgd_hooks.cli.main import main

sys.exit(main())
