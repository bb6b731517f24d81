"""A process that calls reward functions, and instances of environments, for another one.

It is run as a script, and needs no package of its own.

    python worker.py FILE_DESCRIPTOR [FOLDER ...]

The folders are those from which modules are imported. It receives (kind, source, name, arguments) of one call after
another: source is the file or the module of the function. It answers `ok` with the function's parameters if the kind is
`load`, else with what `call` returns; or `error` with a text. Before `ok` it may say `raised`, with the end of a
traceback, while it still looks for the answer that is to blame. With the other kinds, the name is that of a class: see
`serve`.
"""

import asyncio
import ctypes
import functools
import importlib
import importlib.util
import inspect
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
METHODS = ("reset", "step", "reward")  # of an environment
LINES = 12  # of a traceback
LONGEST = 200  # characters of a value in an error
INSTANCES: dict[int, Any] = {}  # of environments, by key


def main() -> None:
    """Serves the connection until it is closed."""
    if sys.platform == "linux":
        # A function that hangs must not outlive the run.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    connection = Connection(int(sys.argv[1]))
    sys.path[:] = sys.argv[2:]
    # One for all calls: clients that a function keeps belong to the loop in which they were made.
    loop = asyncio.new_event_loop()
    while True:
        try:
            kind, source, name, arguments = connection.recv()
        except EOFError:
            return
        try:
            if kind not in ("load", "call"):
                connection.send(("ok", serve(source, name, kind, arguments)))
                continue
            function = load(source, name)
            if kind == "load":
                connection.send(("ok", parameters(function)))
            else:
                connection.send(("ok", call(function, arguments, loop, lambda text: connection.send(("raised", text)))))
        except BaseException:  # whatever a user's function raises, SystemExit among them
            connection.send(("error", last_lines()))


@functools.cache
def module_of(source: str) -> Any:
    """The module in a file, imported once for all of its functions; or of that name, if it does not end in `.py`."""
    if not source.endswith(".py"):
        return importlib.import_module(source)
    path = Path(source)
    # Files beside it can be imported.
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"rewards_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{source} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def load(source: str, name: str) -> Callable[..., Any]:
    """The function `name` of a file, or of a module if `source` does not end in `.py`."""
    module = module_of(source)
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


def call(
    function: Callable[..., Any],
    arguments: dict[str, list[Any]],
    loop: asyncio.AbstractEventLoop,
    raised: Callable[[str], None],
) -> tuple[Any, tuple[int, str] | None]:
    """(what `plain` makes of the function's result, None), or (None, (the first row that it fails on, the error)).

    The row is -1 if the function fails on several rows and on none of them alone. loop: of async functions. raised: is
    called with the error before the row is looked for.
    """
    try:
        return plain(run(function, arguments, loop)), None
    except Exception:
        whole = last_lines()
    count = len(next(iter(arguments.values())))
    if count > 1:
        raised(whole)
    for row in range(count if count > 1 else 0):
        try:
            run(function, {name: values[row : row + 1] for name, values in arguments.items()}, loop)
        except Exception:
            return None, (row, last_lines())
    return None, (0 if count == 1 else -1, whole)


def run(function: Callable[..., Any], arguments: dict[str, list[Any]], loop: asyncio.AbstractEventLoop) -> Any:
    """The result of a plain or an async function."""
    result = function(**arguments)
    if inspect.isawaitable(result):

        async def wait() -> Any:
            return await result

        return loop.run_until_complete(wait())
    return result


def plain(result: Any) -> list[float | str | None] | str:
    """Rewards of Python's own types, so that the other process needs no library and no class of the function's.

    What is neither a number nor None becomes its `repr`, and a result that is no list the name of its type.
    """
    result = result.tolist() if hasattr(result, "tolist") else result  # arrays of numpy and torch
    if not isinstance(result, list | tuple):
        return type(result).__name__
    return [None if value is None else number(value) for value in result]


def number(value: Any) -> float | str:
    """The value as a float, or its `repr` if it is none."""
    if not isinstance(value, str | bytes):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    return repr(value)[:LONGEST]


def serve(source: str, name: str, kind: str, arguments: Mapping[str, Any]) -> Any:
    """Calls an instance of the class `name`, an `Environment`; instances are kept by their `key`.

    `load class`: the columns that it needs and the methods that it lacks. One of METHODS: what the method returns, as
    `["json", value]`, or `["repr", text]` if that is not JSON; `["unknown"]` for a key that this process does not have
    because it took the place of another one. `reward` forgets the instance.
    """
    if kind == "load class":
        return described(module_of(source), source, name)
    key = arguments["key"]
    if kind == "reset":
        instance = getattr(module_of(source), name)()
        messages = as_json(instance.reset(arguments["row"]))
        if arguments["keep"]:
            INSTANCES[key] = instance
        return messages
    if key not in INSTANCES:
        return ["unknown"]
    if kind == "step":
        return as_json(INSTANCES[key].step(arguments["completion"]))
    reward = INSTANCES.pop(key).reward()
    return ["json", None if reward is None else number(reward)]


def described(module: Any, source: str, name: str) -> dict[str, Any]:
    """What the process of the run checks of a class before it is used."""
    one = getattr(module, name, None)
    if not inspect.isclass(one):
        classes = sorted(n for n, x in vars(module).items() if inspect.isclass(x) and x.__module__ == module.__name__)
        raise AttributeError(f"{source} has no class {name!r}; it has {', '.join(classes) or 'none'}")
    missing = [method for method in METHODS if not callable(getattr(one, method, None))]
    return {"columns": [str(column) for column in getattr(one, "columns", ())], "missing": missing}


def as_json(value: Any) -> list[Any]:
    """`["json", value]` of plain types, or `["repr", text]` for a value that JSON does not hold."""
    try:
        return ["json", json.loads(json.dumps(value, allow_nan=False))]
    except (TypeError, ValueError):
        return ["repr", repr(value)[:LONGEST]]


def last_lines() -> str:
    """The end of the traceback of the exception that is being handled."""
    return "".join(traceback.format_exc().splitlines(keepends=True)[-LINES:]).rstrip()


if __name__ == "__main__":
    # What a function prints goes to the log of the run, which is the standard error here.
    os.dup2(2, 1)
    main()
