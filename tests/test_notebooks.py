"""Notebooks are valid, carry no outputs, and their code runs."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from docs_names import is_config_field, names

import jaxft

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CONFIG_LINE = 'CONFIG = "configs/quickstart.py"'
DISPLAY_LINE = "from IPython.display import Image"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_is_a_notebook_of_format_4_5(path: Path) -> None:
    notebook = read(path)
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(ids) == len(set(ids)) and all(1 <= len(i) <= 64 and i.replace("-", "").isalnum() for i in ids)
    for cell in notebook["cells"]:
        wanted = {"cell_type", "id", "metadata", "source"}
        wanted |= {"outputs", "execution_count"} if cell["cell_type"] == "code" else set()
        assert set(cell) == wanted and cell["cell_type"] in ("code", "markdown")
        assert cell["source"] and all(isinstance(line, str) for line in cell["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_validates_with_nbformat(path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(path, as_version=4))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_has_no_outputs_and_compiles(path: Path) -> None:
    for cell in read(path)["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    for number, source in enumerate(code_cells(path)):
        compile(source, f"{path.name} code cell {number}", "exec")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_imports_and_calls_only_what_the_package_has(path: Path) -> None:
    for node in ast.walk(ast.parse("\n".join(code_cells(path)))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("jaxft"):
            wanted = {alias.name for alias in node.names}
            assert wanted <= names().modules[node.module.replace(".", "/")], ast.unparse(node)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "jaxft":
            assert node.attr in jaxft.__all__, ast.unparse(node)
        if isinstance(node, ast.Constant) and re.fullmatch(r"[a-z]+\.[a-z_.]+", str(node.value)):
            assert is_config_field(node.value), node.value


@pytest.mark.slow
def test_quickstart_runs_as_smoke(tmp_path: Path) -> None:
    cells = code_cells(ROOT / "notebooks" / "quickstart.ipynb")
    source = "\n\n".join(cells)
    assert source.count(CONFIG_LINE) == 1
    source = source.replace(CONFIG_LINE, 'CONFIG = "configs/quickstart.py:smoke"')
    # As when Jupyter was started in the notebooks folder.
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "notebooks").mkdir()
    # A notebook's kernel has IPython, a plain Python need not.
    assert source.count(DISPLAY_LINE) == 1
    source = source.replace(DISPLAY_LINE, "def Image(filename): open(filename, 'rb').close()")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", source],
        cwd=tmp_path / "notebooks", env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "base: 0 of 4 right (json_exact)" in done.stdout
    assert (tmp_path / "runs" / "notebook-merged" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "notebook" / "adapter" / "adapter_config.json").is_file()
