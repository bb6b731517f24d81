"""A process that calls reward functions for another one. It is run as a script, and needs no package of its own.

    python worker.py FILE_DESCRIPTOR

It receives (source, name) of a function, a file or a module with it, and answers with the function's parameters. Then
it receives the keyword arguments of one call after another, and answers with the returned list.
"""

import asyncio
import ctypes
import importlib
import importlib.util
import inspect
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
LINES = 12  # of a traceback


def main() -> None:
    """Serves the connection until it is closed."""
    if sys.platform == "linux":
        # A function that hangs must not outlive the run.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    connection = Connection(int(sys.argv[1]))
    functions: dict[tuple[str, str], Callable[..., Any]] = {}
    while True:
        try:
            kind, source, name, arguments = connection.recv()
        except EOFError:
            return
        try:
            if (source, name) not in functions:
                functions[source, name] = load(source, name)
            function = functions[source, name]
            connection.send(("ok", parameters(function) if kind == "load" else call(function, arguments)))
        except BaseException:  # whatever a user's function raises, SystemExit among them
            connection.send(("error", last_lines()))


def load(source: str, name: str) -> Callable[..., Any]:
    """The function `name` of a file, or of a module if `source` does not end in `.py`."""
    if source.endswith(".py"):
        path = Path(source)
        # Files beside it can be imported.
        sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location(f"rewards_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{source} cannot be imported")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(source)
    function = getattr(module, name, None)
    if not callable(function):
        raise AttributeError(f"{source} has no function {name!r}; it has {', '.join(functions_of(module))}")
    return function


def functions_of(module: Any) -> list[str]:
    """The names of the functions that a module defines."""
    return sorted(
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    )


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """names: those that it takes. needed: those without a default. any: whether it takes other names too."""
    given = inspect.signature(function).parameters.values()
    named = [p for p in given if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {
        "names": [p.name for p in named],
        "needed": [p.name for p in named if p.default is p.empty],
        "any": any(p.kind is p.VAR_KEYWORD for p in given),
    }


def call(function: Callable[..., Any], arguments: dict[str, list[Any]]) -> tuple[Any, tuple[int, str] | None]:
    """(what the function returns, None), or (None, (the first row that it fails on, the error)).

    The row is -1 if the function fails on several rows and on none of them alone.
    """
    try:
        return run(function, arguments), None
    except Exception:
        whole = last_lines()
    count = len(next(iter(arguments.values())))
    for row in range(count if count > 1 else 0):
        try:
            run(function, {name: values[row : row + 1] for name, values in arguments.items()})
        except Exception:
            return None, (row, last_lines())
    return None, (0 if count == 1 else -1, whole)


def run(function: Callable[..., Any], arguments: dict[str, list[Any]]) -> Any:
    """The result of a plain or an async function, as a list if it is one of numbers."""
    result = function(**arguments)
    if inspect.isawaitable(result):

        async def wait() -> Any:
            return await result

        result = asyncio.run(wait())
    # Arrays of numpy and torch become lists, so that the other process needs neither.
    return result.tolist() if hasattr(result, "tolist") else result


def last_lines() -> str:
    """The end of the traceback of the exception that is being handled."""
    return "".join(traceback.format_exc().splitlines(keepends=True)[-LINES:]).rstrip()


if __name__ == "__main__":
    # What a function prints goes to the log of the run, which is the standard error here.
    os.dup2(2, 1)
    main()
