"""Writes what all notebooks share: badges, the first cell (`notebooks/colab.py`) and the metadata; removes outputs.

    python notebooks/make.py            # all notebooks
    python notebooks/make.py NAME ...   # some of them, without .ipynb

Run it after a change of `notebooks/colab.py` and after work on a notebook in Jupyter. All other cells stay as they are.
A new notebook needs a first cell with its title and a line in RUNTIMES.
"""

import ast
import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
# Where the notebooks and jaxft itself are published, and the branch that the badges open.
REPOSITORY = "https://github.com/OWNER/jaxft"
BRANCH = "main"
# The runtime that Colab offers first, and whether the notebook needs HF_TOKEN.
RUNTIMES: dict[str, tuple[str, bool]] = {
    "quickstart": ("CPU", False),
    "worth_it": ("CPU", False),
    "your_data": ("CPU", False),
    "plan_a_pod": ("CPU", False),
    "qlora_8b": ("T4", False),
    "preferences": ("CPU", False),
    "export_and_serve": ("CPU", False),
    "adapters": ("CPU", False),
}
# Notebooks that use all devices of the machine. The others train small models and use one.
ALL_DEVICES = {"plan_a_pod", "qlora_8b"}
ABOUT = """\
## Set up

The next cell installs jaxft, with JAX for the GPU or TPU of this runtime, and checks that JAX uses it. In a checkout of
jaxft it installs nothing. It runs on Colab (CPU, GPU, TPU), on Kaggle (with Internet on, in its settings) and in your
own Jupyter. If it asks you to restart the session, do so and run it again. Everything is written below one folder,
which it prints; `DRIVE = True` takes a folder of your Google Drive, which outlives the session. With the environment
variable `SMOKE=1` the whole notebook shrinks to a tiny random model that learns nothing, as a test of the code."""


def badges(name: str) -> str:
    """The buttons that open a notebook in Colab and on Kaggle, in Markdown."""
    path = f"blob/{BRANCH}/notebooks/{name}.ipynb"
    colab = f"https://colab.research.google.com/{REPOSITORY.removeprefix('https://').replace('.com', '', 1)}/{path}"
    kaggle = f"https://kaggle.com/kernels/welcome?src={REPOSITORY}/{path}"
    return (
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab}) "
        f"[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]({kaggle})"
    )


def first_cell(name: str) -> str:
    """The code of the first cell: its settings, the helper without its docstring, and one call."""
    source = (FOLDER / "colab.py").read_text(encoding="utf-8")
    options = f"token={RUNTIMES[name][1]}, all_devices={name in ALL_DEVICES}"
    docstring = ast.parse(source).body[0]
    helper = "\n".join(source.splitlines()[docstring.end_lineno :]).strip()
    return (
        "# @title Set up: run this cell first\n"
        "# Where jaxft comes from if it is not installed: a git address, a release such as jaxft==0.1.0, or a folder.\n"
        f'REPOSITORY = "{REPOSITORY}"  # @param {{type: "string"}}\n'
        'DRIVE = False  # @param {type: "boolean"}\n\n'
        f"{helper}\n\n\n"
        'SMOKE = os.environ.get("SMOKE") == "1"\n'
        f'ROOT = set_up(REPOSITORY, drive=DRIVE, {options}, root=globals().get("ROOT"))'
    )


def cell(kind: str, name: str, text: str, **metadata: Any) -> dict[str, Any]:
    """A cell of a notebook of format 4.5, without output."""
    outputs = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": name, "metadata": metadata, **outputs, "source": text.splitlines(keepends=True)}


def remade(notebook: dict[str, Any], name: str) -> dict[str, Any]:
    """The notebook with the shared cells as they are to be, and no outputs. Raises KeyError for an unknown name."""
    runtime = RUNTIMES[name][0]
    shared = [
        cell("markdown", "badges", badges(name)),
        cell("markdown", "setup-about", ABOUT),
        cell("code", "setup", first_cell(name), cellView="form"),
    ]
    ids = {one["id"] for one in shared}
    title, *rest = [
        cell(one["cell_type"], one["id"], "".join(one["source"]).rstrip("\n"))
        for one in notebook["cells"]
        if one["id"] not in ids
    ]
    hint = {} if runtime == "CPU" else {"accelerator": "TPU" if runtime in ("V5E1", "V6E1") else "GPU"}
    return {
        "cells": [title, *shared, *rest],
        "metadata": {
            **hint,
            "colab": {"provenance": [], **({"gpuType": runtime} if hint else {})},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def as_text(notebook: dict[str, Any]) -> str:
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main(names: list[str]) -> None:
    for name in names or RUNTIMES:
        path = FOLDER / f"{name}.ipynb"
        path.write_text(as_text(remade(json.loads(path.read_text(encoding="utf-8")), name)), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
