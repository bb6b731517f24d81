"""What is installed: a file for each Python that the suite runs on, which names versions and nothing else."""

import importlib.util
import re
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FILES = {path.stem: path for path in (ROOT / "constraints").glob("*.txt")}
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_each_line_is_a_name_and_its_version(python):
    lines = FILES[python].read_text(encoding="utf-8").splitlines()
    assert len(lines) > 50 and lines == sorted(set(lines), key=lambda line: line.split("==")[0])
    for line in lines:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*==[0-9]+(\.[0-9a-z]+)*", line), line


@pytest.mark.skipif(VERSION not in FILES, reason="no versions are written down for this Python")
def test_what_setup_asks_for_is_written_down_and_fits():
    pins = dict(line.split("==") for line in FILES[VERSION].read_text(encoding="utf-8").split())
    asked = [Requirement(text) for text in requires("jaxft")]
    asked = [one for one in asked if one.marker is None or one.marker.evaluate({"extra": "test"})]
    assert len(asked) > 25
    for one in asked:
        name = re.sub(r"[-_.]+", "-", one.name).lower()
        assert name in pins and one.specifier.contains(pins[name]), f"{one}: make constraints"


def test_builds_and_jaxft_itself_are_left_out():
    spec = importlib.util.spec_from_file_location("make", ROOT / "constraints" / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    found = make.lines([("torch", "2.13.0+cpu"), ("jaxft", "0.1.0"), ("Jinja2", "3.1.6"), ("array_record", "0.8.6")])
    assert found == ["array-record==0.8.6", "jinja2==3.1.6", "torch==2.13.0"]
