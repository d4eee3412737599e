"""The house plan as a test: imports go down only, some rooms never see torch, and nothing dangerous is called."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "shoal"

FLOORS = {
    "errors": 0,
    "log": 0,
    "allocator": 0,
    "config": 1,
    "device": 1,
    "presets": 2,
    "quant": 3,
    "kernels": 3,
    "parallel": 3,
    "text": 3,
    "planner": 3,
    "model": 4,
    "checkpoint": 5,
    "training": 6,
    "engine": 6,
    "rl": 7,
    "server": 7,
    "report": 7,
    "recipes": 8,
    "cli": 9,
    "__main__": 10,
}
WITHOUT_TORCH = ("text", "planner", "report", "config", "errors", "log", "presets", "allocator")
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "pickle.load",
    "pickle.loads",
    "torch.load",
    "yaml.load",
    "os.system",
    "sympy.sympify",
}
FORBIDDEN_NAMES = {"utils", "common", "helpers", "misc"}


def imported_modules(tree: ast.AST) -> list[str]:
    """Every module that is imported anywhere in the tree, also inside functions."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def upward_imports(room: str, tree: ast.AST) -> list[str]:
    """Imports of `shoal` rooms that are not below `room`."""
    rooms = {name.split(".")[1] for name in imported_modules(tree) if name.startswith("shoal.")} & set(FLOORS)
    same_root_floor = {
        "errors": {"errors"},
        "log": {"errors", "log"},
        "config": {"config", "device"},
        "device": {"config", "device"},
    }
    allowed = same_root_floor.get(room, {room})
    return sorted(other for other in rooms - allowed if FLOORS[other] >= FLOORS[room])


def dangerous_calls(tree: ast.AST) -> list[str]:
    """Names of forbidden functions that are called."""

    def dotted(node: ast.AST) -> str:
        if isinstance(node, ast.Name):
            return node.id
        return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""

    return [
        dotted(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and dotted(node.func) in FORBIDDEN_CALLS
    ]


def _files() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):
            found.append((parts[0], path))
    return found


def test_every_room_has_a_floor_and_no_room_is_a_drawer():
    assert {room for room, _ in _files()} <= set(FLOORS)
    assert not {path.stem for _, path in _files()} & FORBIDDEN_NAMES


def test_imports_go_down_only():
    upward = {str(path): upward_imports(room, ast.parse(path.read_text(encoding="utf-8"))) for room, path in _files()}
    assert {path: rooms for path, rooms in upward.items() if rooms} == {}


def test_rooms_that_promise_to_do_without_torch_keep_it():
    guilty = []
    for room, path in _files():
        names = imported_modules(ast.parse(path.read_text(encoding="utf-8")))
        if room in WITHOUT_TORCH and any(name == "torch" or name.startswith("torch.") for name in names):
            guilty.append(str(path))
    assert guilty == []


def test_nothing_dangerous_is_called():
    guilty = {str(path): dangerous_calls(ast.parse(path.read_text(encoding="utf-8"))) for _, path in _files()}
    assert {path: calls for path, calls in guilty.items() if calls} == {}


@pytest.mark.parametrize(
    "room, source, expected",
    [
        ("model", "from shoal.engine.engine import Engine", ["engine"]),
        ("training", "def f():\n    import shoal.engine.engine", ["engine"]),
        (
            "text",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from shoal.planner import counts",
            ["planner"],
        ),
        ("rl", "from shoal import server", ["server"]),
        ("engine", "from shoal.model.mla import LatentAttention\nfrom shoal.engine.request import Request", []),
    ],
)
def test_the_checker_sees_what_it_should(room, source, expected):
    assert upward_imports(room, ast.parse(source)) == expected


def test_the_checker_sees_dangerous_calls():
    assert dangerous_calls(ast.parse("import torch\ntorch.load('x'); eval('1'); model.eval()")) == [
        "torch.load",
        "eval",
    ]
