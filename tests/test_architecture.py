"""The house rules, read from the code: imports run only downward, and what no room may do."""

import ast
import functools
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jaxft"
FLOORS = {
    "assets": 0, "errors": 0, "home": 0, "optional": 0, "quant": 0, "system": 0, "terminal": 0, "trees": 0,
    "config": 1, "files": 1, "nn": 1,
    "data": 2, "models": 2, "optim": 2, "sharding": 2,
    "adapters": 3, "generation": 3, "objectives": 3,
    "checkpoint": 4, "evaluation": 4, "hardware": 4, "rollouts": 4, "training": 4,
    "conversion": 5, "methods": 5, "resident": 5,
    "runs": 6,
    "comparison": 7, "doctor": 7, "planning": 7,
    "api": 8, "pods": 8, "serving": 8,
    "cli": 9, "__init__": 9,
}  # fmt: skip
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported_rooms(path):
    """(line, room) of every import of jaxft in a module, also inside functions."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names = [node.module] if node.module != "jaxft" else [f"jaxft.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first == "jaxft":
                yield node.lineno, rest[0] if rest else "__init__"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward(path):
    room = room_of(path)
    assert room in FLOORS, f"{room} has no floor: give it one here"
    wrong = [
        f"{path}:{line}: {room} (floor {FLOORS[room]}) imports {other} (floor {FLOORS.get(other, '?')})"
        for line, other in imported_rooms(path)
        if other != room and FLOORS.get(other, 99) >= FLOORS[room]
    ]
    assert not wrong, "\n".join(wrong)


def imported_modules(path):
    """The modules of the package that a module imports, also inside functions and for types alone."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxft"):
            base = PACKAGE.parent / node.module.replace(".", "/")
            for alias in node.names:
                inner = base / f"{alias.name}.py"
                file = inner if inner.is_file() else base.with_suffix(".py")
                yield file if file.is_file() else base / "__init__.py"


def test_no_modules_import_each_other():
    """graphlib raises CycleError, which names the circle."""
    order = graphlib.TopologicalSorter({path: set(imported_modules(path)) - {path} for path in MODULES})
    assert len(list(order.static_order())) >= len(MODULES)


FORBIDDEN = {"tensorflow", "tensorboard"}
# Read back by the library that an export is for, where it is installed.
ORACLES = {"torch": {"checkpoint/verify.py"}, "peft": {"checkpoint/verify.py"}}
# It hands every exception of a user's function to the process of the run, which raises it there.
HANDS_ON_ERRORS = {"rollouts/reward_functions/worker.py", "data/encoded/worker.py", "files/deadlines.py"}
# Whatever the libraries of trackers, event files and charts raise is printed, and no reason to end a run.
REPORTS_ERRORS = {"training/trackers.py", "training/tensorboard.py", "runs/report/keeping.py"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_leans_on_another_framework(path):
    for node in ast.walk(parsed(path)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in {name.split(".")[0] for name in names}:
            assert name not in FORBIDDEN, f"{path}:{node.lineno}: imports {name}"
            allowed = ORACLES.get(name)
            assert allowed is None or str(path.relative_to(PACKAGE)) in allowed, f"{path}:{node.lineno}: imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_error_is_swallowed_and_no_user_meets_an_assert(path):
    for node in ast.walk(parsed(path)):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Assert), f"{where}: raise a JaxftError that says how to mend it"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{where}: bare except"
            broad = isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
            reraises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            hands_on = str(path.relative_to(PACKAGE)) in HANDS_ON_ERRORS | REPORTS_ERRORS
            assert not broad or reraises or hands_on, f"{where}: catches everything and goes on"


def test_only_one_module_reads_config_dicts():
    # `get` on a locked ConfigDict gives the default for a misspelt name without a word.
    for path in MODULES:
        imports = {node.module for node in ast.walk(parsed(path)) if isinstance(node, ast.ImportFrom)}
        if "ml_collections" in imports:
            assert path == PACKAGE / "config" / "reading" / "python_file.py", path
    smoke = parsed(PACKAGE / "config" / "smoke.py")
    assert not [n for n in ast.walk(smoke) if isinstance(n, ast.Attribute) and n.attr == "get"]
    for path in (PACKAGE.parent / "configs").glob("*.py"):
        assert ".get(" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 400, f"{path} has {lines} lines: it holds more than one thing"
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{path}:{node.lineno}: {node.name} has {length} lines"


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES}), ids=lambda path: path.name)
def test_folders_stay_small(folder):
    modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= 16, f"{folder} has {len(modules)} modules: sort them into rooms"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_things_are_documented(path):
    tree = parsed(path)
    assert ast.get_docstring(tree), f"{path} does not say what it is"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}:{node.lineno}: {node.name} has no docstring"


def test_importing_the_package_does_not_wait_for_jax():
    import subprocess
    import sys

    code = "import sys, jaxft, jaxft.config, jaxft.cli; sys.exit('jax' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=False).returncode == 0


def test_modules_are_found_without_a_registry():
    assert len(MODULES) > 50
    assert {room_of(path) for path in MODULES} == set(FLOORS)


def test_test_files_have_names_of_their_own():
    # pytest imports them as top-level modules, so that the second of two with one name is not run.
    names = [path.name for path in (PACKAGE.parent / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
