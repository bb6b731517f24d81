"""The planning process: reads a request, plans or searches, and writes the result as JSON.

Run as `python -m jaxft.planning.process RESULT < REQUEST`, in a process of its own because JAX must start without
devices.
"""

import json
import sys
from pathlib import Path
from typing import Any

from jaxft import config as config_module
from jaxft.config import RunConfig
from jaxft.errors import ConfigError, ExitCode, JaxftError
from jaxft.hardware.compile import LEVELS
from jaxft.hardware.prices import price_of
from jaxft.hardware.topology import Topology, parse
from jaxft.planning.changes import changes_of
from jaxft.planning.job import abstract_step_of, sharded_step_of
from jaxft.planning.result import plan_result
from jaxft.planning.rollout import estimate_run, measure_run
from jaxft.planning.search import search
from jaxft.planning.shapes import Length, length_of, shapes_of


def plan(config: RunConfig, topology: Topology, *, level: str, prices: str | None, length: Length) -> dict[str, Any]:
    """The plan of a config on a topology; with `changes` that would make it fit if it does not. See `jaxft.plan`."""
    price_of(topology.chip.name, prices)  # a missing price is an error before anything is compiled
    hf_config, shapes_from = shapes_of(config)
    abstract_step = abstract_step_of(config, hf_config, length.steps)
    step = sharded_step_of(abstract_step, config, topology)
    costs = measure_run(step, level)
    result = plan_result(step, costs, level=level, length=length, shapes_from=shapes_from, prices=prices)
    if not result["fits"]:
        result["changes"] = changes_of(
            lambda changed: abstract_step_of(changed, hf_config, length.steps),
            step.config,
            topology,
            result["hbm_limit_bytes"],
            costs,
            estimate_run(sharded_step_of(abstract_step, config, topology, real=False)),
        )
    return result


def main(request: str, result: Path) -> ExitCode:
    """Carries out one request and writes its result: the plan or the search, or `{refused, kind}` for a JaxftError."""
    fields = json.loads(request)
    try:
        if fields["level"] not in LEVELS:
            raise ConfigError(f"--level={fields['level']} is not one of {', '.join(LEVELS)}")
        config = config_module.resolve(fields["config"])
        length = length_of(config, tokens=fields["tokens"], examples=fields["examples"])
        options = {"level": fields["level"], "prices": fields["prices"], "length": length}
        if fields["search"]:
            answer = search(config, fields["topology"], fields["slices"], compiles=fields["compiles"], **options)
        else:
            answer = plan(config, parse(fields["topology"], fields["slices"]), **options)
    except JaxftError as error:
        answer = {"refused": str(error), "kind": type(error).__name__}
    result.write_text(json.dumps(answer), encoding="utf-8")
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main(sys.stdin.read(), Path(sys.argv[1])))
