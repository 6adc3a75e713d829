"""Watch a small YOLO learn from a bigger one: drawn data, a teacher, a student with FGD and one without.

The command is ``fgd quickstart``; `fgd_hooks.quickstart.run.quickstart` is the function behind it.
"""
