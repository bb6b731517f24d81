"""One server, with a stand-in for workers, for the tests of a file; none are collected without the packages for it."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from jaxft.assets import ASSETS

NEEDED = ("openai", "starlette", "uvicorn", "python_multipart")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_report_header() -> str | None:
    return f"tests/serving is left out: {', '.join(MISSING)} is not installed (jaxft[test])" if MISSING else None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from servers import in_thread

    with in_thread(tmp_path_factory.mktemp("serving") / "state", str(ASSETS / "smoke")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Any) -> Any:
    return server.client()
