"""`jaxft.plan`: sends a request to a planning process, in which JAX starts without devices, and reads its answer."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxft import errors
from jaxft.config import RunConfig
from jaxft.hardware.compile import ENVIRONMENT, pairing
from jaxft.hardware.gpu_compile import NO_COMPILER
from jaxft.hardware.topology import parse


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
    """Memory, time and price of a run on accelerators that this machine does not have. docs/plan.md explains each key.

    The run's own training step is compiled for the topology, and so are the programs with which its method samples
    answers, if it does. No weights are read; neither weights nor data need be on this machine. topology: `v5e:4x4`,
    `v5p-8`, `v6e:1x1`, or a GPU such as `h100:8`, which is estimated by arithmetic if JAX's CUDA plugin is not
    installed. slices: number of slices of that topology, joined by the data-centre network. level: XLA's optimisation
    level for TPUs, O1 (quick) or default. prices: a file that replaces jaxft's table. tokens, examples: size of the
    training set, if the data is on another machine. search: find the cheapest and the fastest plan instead; topology
    then names kinds of chips, such as `v5e,v6e`. compiles: candidates that a search compiles at most for each of
    cheapest and fastest.
    Raises ConfigError or ModelError for everything that a run would refuse, an unknown topology, and a missing libtpu.
    """
    request = {
        "config": config.to_dict(), "topology": topology, "slices": slices, "level": level, "prices": prices,
        "tokens": tokens, "examples": examples, "search": search, "compiles": compiles,
    }  # fmt: skip
    return _answer(request)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """The answer of a planning process to one request.

    If the compiler for GPUs dies, a second process plans by arithmetic, as without that compiler.
    """
    answer = _run(request, {})
    if isinstance(answer, _Death) and _is_gpu(request):
        died, answer = answer, _run(request, {NO_COMPILER: "1"})
        if isinstance(answer, dict) and "unknown" in answer:
            answer["unknown"].insert(0, f"why {died}")
    if isinstance(answer, _Death):
        raise errors.ConfigError(
            f"{answer}. The cause is libtpu and not the config, or too little memory on this machine (signal 9). Use a "
            f"jax and a libtpu that were tested together ({pairing()[0]}), or try the other --level or larger shapes."
        )
    if "kind" in answer and answer.get("refused"):
        raise getattr(errors, answer["kind"])(answer["refused"])
    return answer


def _is_gpu(request: dict[str, Any]) -> bool:
    """Whether a request names GPUs. A search may name kinds of both makers."""
    names = request["topology"].split(",")
    return any(parse(name).chip.maker == "gpu" for name in names)


class _Death(str):
    """A compiler that ended its process, in words."""


def _run(request: dict[str, Any], further: Mapping[str, str]) -> dict[str, Any] | _Death:
    """The answer of a process, or what it died of. further: variables of its environment."""
    package = str(Path(__file__).parents[2])
    paths = [package, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), **further}
    # Flags for this process's devices, such as a number of them, do not concern the other.
    environment.pop("XLA_FLAGS", None)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        done = subprocess.run(
            [sys.executable, "-m", "jaxft.planning.process", str(result)],
            input=json.dumps(request), text=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            check=False,
        )  # fmt: skip
        if result.is_file():
            return json.loads(result.read_text(encoding="utf-8"))
    log = done.stderr.strip().splitlines()
    if done.returncode < 0:
        reasons = [line.strip() for line in log if "Check failed" in line or line.startswith("F")]
        cause = reasons[-1] if reasons else "it gives no reason"
        return _Death(f"the compiler for {request['topology']} died of signal {-done.returncode}: {cause}")
    tail = "\n".join(log[-25:])
    raise RuntimeError(f"the planning process ended with {done.returncode} and no result ({pairing()[0]}):\n{tail}")
