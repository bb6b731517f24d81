"""Notebooks are valid, carry no outputs, share their first cell, and run as they are written."""

import ast
import importlib.util
import json
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from docs_names import is_config_field, names_of_module

import jaxft

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# The one whose cells run in the quick suite, up to this heading: what follows takes six times as long.
QUICK, QUICK_END = "your_data.ipynb", "## Train\n"
# What each notebook says at smoke size, in the first run and after a restart.
FACTS: dict[str, tuple[str, ...]] = {
    "worth_it": (
        r"tuned +right +\d+ of 4",
        r"by field: intent \d+%, product",
        "These rows cannot tell them apart",
        "against zero +tuning is cheaper",
    ),
    "adapters": (
        r"people +\d\.\d\d MB with the base",
        r"shop and people +\d\.\d{3} +\d\.\d{3}",
        r"linear, 0\.5 and 0\.5 +\d\.\d{3}",
        r"read again, logits differ by (0\.0e\+00|\d\.\de-0[6-9])",
    ),
    "export_and_serve": (
        r"the run +0\.0e\+00",
        r"merged +\d\.\de-0[6-9]",
        r"untrained base +\d\.\de-0[12]",
        r"MB  runs/export/lora-f32\.gguf",
        r"llama\.cpp: not run",
    ),
    "preferences": (
        "the chosen answer is the shorter one in 100% of the pairs",
        r"rewards/margins +-?0\.000 ",
        r"base: \d of 4 right",
        "frac_reward_zero_std",
    ),
    "qlora_8b": (
        r"t4:1: 7\.\d\d of 14\.10 GiB on each device, estimated",
        r"tuned: \d of 4 right",
        r"adapter_model\.safetensors",
        r"qlora-8b-merged: .*model\.safetensors",
    ),
    "plan_a_pod": (
        "IT DOES NOT FIT",
        r"a slice of v5e:2x4: .*GiB",
        "It fits",
        r"h100:8, chips: 8",
        r"step 4: loss .* on eight",
        r"mesh.fsdp=3 make 3 devices",
        r"at most 2.0 h, USD \d",
        r"gcloud .* create",
    ),
    "quickstart": (r"base: 0 of 4 right \(json_exact\)", r"tuned: \d of 4 right", r"notebook-merged"),
    "your_data": (
        r"\[\[laptop \| hinge \| works only sometimes \| urgent<\|im_end\|>\]\]",
        "refused: 19 of 40 examples",
        "has role 'asistant'",
        "1 of 8 held-out examples are in the training set too",
        "row 1 shares 88%",
        r"tuned: \d of 8 right",
    ),
}


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


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_notebooks", ROOT / "notebooks" / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_is_as_the_generator_writes_it(path: Path, make: ModuleType) -> None:
    mend = f"run: python notebooks/make.py {path.stem}"
    assert path.read_text(encoding="utf-8") == make.as_text(make.remade(read(path), path.stem)), mend
    assert code_cells(path)[0] == make.first_cell(path.stem)


def test_the_generator_removes_what_jupyter_adds_and_keeps_the_rest(make: ModuleType) -> None:
    written = read(ROOT / "notebooks" / "quickstart.ipynb")
    touched = json.loads(json.dumps(written))
    for number, cell in enumerate(touched["cells"]):
        cell["metadata"]["execution"] = {"start": "2026-01-01"}
        if cell["cell_type"] == "code":
            cell |= {"execution_count": number, "outputs": [{"output_type": "stream", "name": "stdout", "text": "x"}]}
    touched["metadata"]["widgets"] = {"state": {}}
    touched["cells"][3]["source"] = ["old = True"]
    assert make.remade(touched, "quickstart") == written
    touched["cells"][-1]["source"] = ["own = 1"]
    assert make.remade(touched, "quickstart")["cells"][-1]["source"] == ["own = 1"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_the_readme_opens_it_in_a_browser(path: Path, make: ModuleType) -> None:
    badges = make.badges(path.stem)
    assert badges in (ROOT / "README.md").read_text(encoding="utf-8")
    addresses = re.findall(r"\]\((https://[^)]+ipynb)\)", badges)
    assert len(addresses) == 2 and all(one.endswith(f"/notebooks/{path.name}") for one in addresses)


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
            assert wanted <= (names_of_module(node.module) or set()), ast.unparse(node)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "jaxft":
            assert node.attr in jaxft.__all__, ast.unparse(node)
        if isinstance(node, ast.Constant) and re.fullmatch(r"[a-z]+\.[a-z_.]+", str(node.value)):
            if node.value.startswith("jaxft."):
                assert names_of_module(node.value) is not None, node.value
            elif not node.value.endswith((".jsonl", ".json")):
                assert is_config_field(node.value), node.value


def execute(path: Path, folder: Path, *, end: str | None = None) -> str:
    """All that a notebook prints, executed in a fresh kernel that starts in a folder; it fails as the notebook does.

    end: how the cell begins at which to stop.
    """
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    if end:
        stop = next(number for number, cell in enumerate(notebook.cells) if cell.source.startswith(end))
        notebook.cells = notebook.cells[:stop]
    # The first cell leaves small models one device of several, which it cannot do on the CPU.
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SMOKE": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=environment)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if "Traceback" in output.get("text", "")]
    return "".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs)


def check_facts(facts: tuple[str, ...], text: str) -> None:
    for fact in facts:
        assert re.search(fact, text), f"{fact}\n{text}"


def test_one_runs_as_it_is_until_it_trains(tmp_path: Path) -> None:
    path = ROOT / "notebooks" / QUICK
    facts = tuple(fact for fact in FACTS[path.stem] if not fact.startswith("tuned"))
    check_facts(facts, execute(path, tmp_path, end=QUICK_END))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_runs_from_an_empty_folder_and_again_after_a_restart(path: Path, tmp_path: Path) -> None:
    first = execute(path, tmp_path)
    assert f"working in {tmp_path}, on " in first
    left = {file.relative_to(tmp_path).parts[0] for file in tmp_path.rglob("*")}
    assert left <= {"runs"}, "a notebook writes below runs/ alone"
    check_facts(FACTS[path.stem], first)
    check_facts(FACTS[path.stem], execute(path, tmp_path))
