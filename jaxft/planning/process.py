"""What a run would take on accelerators that are not there: the real step, compiled ahead of time, counted and priced.

In a process of its own (`python -m jaxft.planning.process RESULT < REQUEST`), because JAX must start without devices.
"""

import json
import sys
from pathlib import Path
from typing import Any

from jaxft import config as config_module
from jaxft.config import RunConfig
from jaxft.errors import ConfigError, JaxftError
from jaxft.hardware.compile import LEVELS
from jaxft.hardware.prices import price_of
from jaxft.hardware.topology import Topology, parse
from jaxft.planning.changes import changes_of
from jaxft.planning.figures import result_of
from jaxft.planning.job import abstract_step_of, estimate, measure, placed_step_of, time_of
from jaxft.planning.search import search
from jaxft.planning.shapes import Length, length_of, shapes_of


def plan(config: RunConfig, slices: Topology, *, level: str, prices: str | None, length: Length) -> dict[str, Any]:
    """See `jaxft.plan`."""
    price_of(slices.chip.name, prices)  # what cannot be priced is refused before it is compiled
    hf_config, shapes = shapes_of(config)
    abstract_step = abstract_step_of(config, hf_config, length.steps)
    job = placed_step_of(abstract_step, config, slices)
    done = measure(job, level)
    figures = result_of(job, done, time_of(job, done.costs), level=level, length=length, shapes=shapes, prices=prices)
    if not figures["fits"]:
        known = estimate(abstract_step, config, slices)
        figures["changes"] = changes_of(
            lambda changed: abstract_step_of(changed, hf_config, length.steps),
            job.config,
            slices,
            figures,
            known.memory,
        )
    return figures


def main(request: str, result: Path) -> int:
    """Carries out one request and writes its result: the figures, or why they are refused."""
    asked = json.loads(request)
    try:
        if asked["level"] not in LEVELS:
            raise ConfigError(f"--level={asked['level']} is not one of {', '.join(LEVELS)}")
        config = config_module.resolve(asked["config"])
        length = length_of(config, tokens=asked["tokens"], examples=asked["examples"])
        options = {"level": asked["level"], "prices": asked["prices"], "length": length}
        if asked["search"]:
            figures = search(config, asked["topology"], asked["slices"], compiles=asked["compiles"], **options)
        else:
            figures = plan(config, parse(asked["topology"], asked["slices"]), **options)
    except JaxftError as error:
        figures = {"refused": str(error), "kind": type(error).__name__}
    result.write_text(json.dumps(figures), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.stdin.read(), Path(sys.argv[1])))
