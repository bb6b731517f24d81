"""A plan in a process of its own: JAX starts there without devices, whatever this process holds."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from jaxft import errors
from jaxft.config import RunConfig
from jaxft.hardware.compile import ENVIRONMENT


def plan(
    config: RunConfig,
    topology: str,
    *,
    slices: int = 1,
    level: str = "O1",
    prices: str | None = None,
    tokens: int | None = None,
    examples: int | None = None,
    search: bool = False,
    compiles: int = 2,
) -> dict[str, Any]:
    """What a run would take on accelerators that are not there: memory, time and money, by docs/plan.md's keys.

    The run's own training step is compiled for the slice; no weight is read, and neither weights nor data need be here.
    topology: `v5e:4x4`, `v5p-8`, `v6e:1x1`, or a GPU such as `h100:8`, planned by arithmetic. slices: of that topology,
    joined by the data-centre network. level: XLA's optimisation, O1 (quick) or default. prices: a file in place of
    jaxft's table. tokens, examples: what the training set holds, where it is not here.
    search: find the cheapest and the fastest way instead; topology then names kinds of chips, such as `v5e,v6e`.
    compiles: how many ways a search compiles, at most, for each of the two.
    Raises ConfigError or ModelError for what a run would refuse, an unknown topology, and a missing libtpu.
    """
    request = {
        "config": config.to_dict(), "topology": topology, "slices": slices, "level": level, "prices": prices,
        "tokens": tokens, "examples": examples, "search": search, "compiles": compiles,
    }  # fmt: skip
    return _answer(request)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """The answer of a planning process to one request."""
    package = str(Path(__file__).parents[2])
    paths = [package, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    # Flags for this process's devices, such as a number of them, do not concern the other.
    environment.pop("XLA_FLAGS", None)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        done = subprocess.run(
            [sys.executable, "-m", "jaxft.planning.process", str(result)],
            input=json.dumps(request), text=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            check=False,
        )  # fmt: skip
        if not result.is_file():
            if done.returncode < 0:
                raise errors.ConfigError(_crash(request["topology"], -done.returncode, done.stderr))
            tail = "\n".join(done.stderr.strip().splitlines()[-25:])
            raise RuntimeError(f"the planning process ended with {done.returncode} and no result:\n{tail}")
        figures = json.loads(result.read_text(encoding="utf-8"))
    if "kind" in figures and figures.get("refused"):
        raise getattr(errors, figures["kind"])(figures["refused"])
    return figures


def _crash(topology: str, number: int, said: str) -> str:
    why = [line for line in said.splitlines() if "Check failed" in line or line.startswith("F")]
    return (
        f"the compiler for {topology} died of signal {number}: {why[-1].strip() if why else 'it does not say why'}. "
        "That is a fault of libtpu and not of the config, or of too little memory on this machine (signal 9). Try the "
        "other --level, larger shapes, or another version of libtpu."
    )
