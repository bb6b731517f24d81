"""The container for TPU hosts: every instruction is one, what is copied exists and suffices to build jaxft."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "tpu_scripts" / "Dockerfile"
KNOWN = {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "ENTRYPOINT", "CMD", "ARG", "LABEL"}


def instructions() -> list[tuple[str, str]]:
    """(name, argument) of each instruction, with continued lines joined."""
    lines = [line for line in FILE.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [(name, argument) for name, _, argument in (line.partition(" ") for line in joined.splitlines())]


def copied() -> list[str]:
    """What the build takes from the checkout."""
    sources = [argument.split()[:-1] for name, argument in instructions() if name == "COPY"]
    return [source for group in sources if not group[0].startswith("--from") for source in group]


def test_instructions_and_copied_files_exist() -> None:
    assert {name for name, _ in instructions()} <= KNOWN
    assert copied() and all((ROOT / source).exists() for source in copied())
    images = [argument.split()[0] for name, argument in instructions() if name == "FROM"]
    (python,) = {re.fullmatch(r"python:(3\.\d+)-slim", image)[1] for image in images}  # type: ignore[index]
    assert f"constraints/{python}.txt" in copied()


def test_it_has_neither_torch_nor_cuda_and_does_not_run_as_root() -> None:
    text = "\n".join(argument for _, argument in instructions())
    assert not re.search(r"torch|cuda|nvidia", text, re.I)
    (install,) = re.findall(r"'\.\[([\w,]+)\]'", text)
    extras = re.findall(r'^ +"(\w+)": \[', (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"tpu", "gcs"} <= set(install.split(",")) <= set(extras)
    last = {name: argument for name, argument in instructions()}
    assert last["USER"] == "$UID" and last["ARG"] == "UID=1000"
    # As a list: a shell would be the process that gets SIGTERM, and would not hand it on.
    assert json.loads(last["ENTRYPOINT"]) == ["jaxft"]


@pytest.mark.slow
def test_what_is_copied_suffices_to_build_jaxft(tmp_path: Path) -> None:
    for source in copied():
        target = tmp_path / source
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, target)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
         "--wheel-dir", "out", "."],
        cwd=tmp_path, check=True,
    )  # fmt: skip
    assert list((tmp_path / "out").glob("jaxft-*.whl"))
