"""The direction of imports: a layer imports from those above it in this list, and from its own; no circle anywhere."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAYERS = [  # from the ground up; `evaluation` stands on errors alone
    "errors masks",
    "utils evaluation",
    "config taps losses adapters",
    "teacher pairing balance schedule guards distilled",
    "distiller initialization",
    "diagnostics",
    "integrations",
    "study __init__",
    "cli __main__ trainers benchmarks results",
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names.split()}
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for folder in ("fgd_hooks", "trainers", "benchmarks", "results")
    for file in (ROOT / folder).rglob("*.py")
}


def imported(module: str) -> set[str]:
    """The project's modules that a module imports, inside functions and for type checking too."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports by a relative name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    found = {name if name in FILES else name.rpartition(".")[0] for name in found}
    return {name for name in found if name in FILES and name != module}


GRAPH = {module: imported(module) for module in FILES}


def layer(module: str) -> int:
    first, *rest = module.split(".")
    return LAYER[first if first != "fgd_hooks" else (rest or ["__init__"])[0]]


def test_imports_point_down():
    upward = [f"{one} -> {other}" for one in GRAPH for other in GRAPH[one] if layer(other) > layer(one)]
    assert not upward


def test_evaluation_stands_on_errors_alone():
    inside = ("fgd_hooks.evaluation", "fgd_hooks.errors")
    others = {
        other for one in GRAPH if one.startswith(inside[0]) for other in GRAPH[one] if not other.startswith(inside)
    }
    assert not others


def test_no_circle():
    TopologicalSorter(GRAPH).prepare()  # raises CycleError, which names it


def test_at_most_nine_floors():
    """A folder of the package, a file at its root and the folders of programs stand above all that they import."""
    rooms = {module: ".".join(module.split(".")[: 2 if module.startswith("fgd_hooks") else 1]) for module in GRAPH}
    below: dict[str, set[str]] = {room: set() for room in rooms.values()}
    for module, others in GRAPH.items():
        below[rooms[module]] |= {rooms[other] for other in others} - {rooms[module]}
    floors: dict[str, int] = {}
    for room in TopologicalSorter(below).static_order():
        floors[room] = 1 + max((floors[other] for other in below[room]), default=0)
    assert max(floors.values()) <= 9, floors
