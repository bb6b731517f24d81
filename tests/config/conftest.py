"""Fixtures of the tests on configs."""

import pytest
from config_files import BODY


@pytest.fixture
def file(tmp_path):
    """file(line) -> a config file with one more line in it."""

    def write(line=""):
        (tmp_path / "run.py").write_text(BODY.format(line=line))
        return str(tmp_path / "run.py")

    return write
