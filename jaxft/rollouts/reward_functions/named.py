"""The reward functions that `rewards.functions` names."""

import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from jaxft.errors import ConfigError, did_you_mean
from jaxft.home import local_path

BUILT_IN = ("exact_match", "json_valid", "json_exact", "math_answer", "python_tests")
MODULE = "jaxft.evaluation.verifiers"


@dataclass(frozen=True, kw_only=True)
class Named:
    """A reward function. name: in metrics. source: its file, or its module. weight: its factor in the reward."""

    name: str
    source: str
    weight: float = 1.0


def named_functions(text: str) -> tuple[Named, ...]:
    """The functions of `rewards.functions`: `FILE.py:NAME` or the name of a built-in one, each with `=WEIGHT` or not.

    Raises ConfigError for an entry of another form, a file that is not there, an unknown built-in one or one whose
    library is not installed, and a name that occurs twice.
    """
    functions = [_named(entry.strip()) for entry in text.split(",") if entry.strip()]
    if not functions:
        raise ConfigError(f"rewards.functions={text!r} names no function: give FILE.py:NAME or {', '.join(BUILT_IN)}")
    names = [one.name for one in functions]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"rewards.functions={text!r} has several functions called {', '.join(twice)}, which would have the same "
            "metrics: rename one of them"
        )
    return tuple(functions)


def _named(entry: str) -> Named:
    function, given, weight_text = entry.rpartition("=")
    if not given or ":" in weight_text:  # then the sign is one of the path
        function, weight = entry, 1.0
    else:
        function, weight = function.strip(), _weight(weight_text.strip(), entry)
    source, colon, name = function.rpartition(":")
    if not colon:
        if function not in BUILT_IN:
            raise ConfigError(
                f"rewards.functions: {function!r} is not a built-in reward function ({', '.join(BUILT_IN)})."
                f"{did_you_mean(function, BUILT_IN)} A function of your own is named FILE.py:NAME."
            )
        if function == "math_answer" and find_spec("math_verify") is None:
            raise ConfigError("rewards.functions: math_answer needs math-verify: pip install 'jaxft[math]'")
        return Named(name=function, source=MODULE, weight=weight)
    if source.endswith(".py"):
        source = local_path(source)
        if not Path(source).is_file():
            raise ConfigError(
                f"rewards.functions: there is no file {source!r}. A path is relative to the folder in which the run is "
                f"started, {Path.cwd()}."
            )
        source = str(Path(source).absolute())
    return Named(name=name, source=source, weight=weight)


def _weight(text: str, entry: str) -> float:
    try:
        weight = float(text)
    except ValueError as error:
        raise ConfigError(f"rewards.functions: the weight in {entry!r} is not a number") from error
    if not math.isfinite(weight):
        raise ConfigError(f"rewards.functions: the weight in {entry!r} is not finite, and no reward would be either")
    return weight
