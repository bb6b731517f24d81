"""What an installed package holds: shipped configs with their files, found outside of a checkout."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import json, os, jaxft
from jaxft.config import load
from jaxft.config.reading import shipped_names
configs = {name: load(name) for name in shipped_names()}
functions = [c.rewards.functions.partition(":")[0] for c in configs.values() if c.rewards.functions]
print(json.dumps({
    "package": jaxft.__file__, "names": list(configs), "smoke": load("configs/quickstart.py:smoke").train.steps,
    "files": [os.path.isfile(path) for path in functions if os.sep in path],
}))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a wheel installs."""
    pytest.importorskip("setuptools")  # environments of Python 3.12 and newer begin without it
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    return folder


def test_the_shipped_configs_are_in_the_package_and_found_by_name(package: Path, tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(package)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, env=env, capture_output=True, check=True)
    told = json.loads(done.stdout)
    assert told["package"].startswith(str(package)) and told["smoke"] == 4
    assert told["names"] == sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    assert len(told["files"]) > 3 and all(told["files"])


def test_every_file_beside_the_configs_is_in_the_package(package: Path) -> None:
    shipped = {path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.*") if "__pycache__" not in path.parts}
    assert shipped == {
        Path("configs") / path.relative_to(package / "jaxft" / "configs")
        for path in (package / "jaxft" / "configs").rglob("*.*")
    }


def test_every_file_of_the_page_is_in_the_package(package: Path) -> None:
    folder = Path("jaxft") / "assets" / "serve"
    names = {path.name for path in (package / folder).iterdir()}
    assert names == {path.name for path in (ROOT / folder).iterdir()} and "app.js" in names


def test_extras_are_installed_by_older_pips_and_those_that_pages_and_errors_name_exist() -> None:
    calls = [
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    (extras,) = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "extras_require"]
    names = {key.value for key in extras.keys}
    # pip 23.2 compares names as they are written with those in the metadata, where underscores are hyphens.
    assert not [name for name in names if not re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", name)]
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "jaxft").rglob("*.py")]
    texts = [path.read_text(encoding="utf-8") for path in files]
    named = {
        name
        for text in texts
        for found in re.findall(r"(?:jaxft|'\.)\[([a-z0-9_,-]+)\]", text)
        for name in found.split(",")
    }
    assert len(named) > 8 and named - {"extras"} <= names  # "extras" stands for any of them
