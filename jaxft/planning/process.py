"""The planning process: reads a request, plans or searches, and writes the result as JSON.

Run as `python -m jaxft.planning.process RESULT < REQUEST`, in a process of its own because JAX must start without
devices.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxft import config as config_module
from jaxft.config import RunConfig
from jaxft.errors import ConfigError, ExitCode, JaxftError
from jaxft.hardware.compile import LEVELS
from jaxft.hardware.prices import price_of
from jaxft.hardware.recomputation import Recomputation, with_policy
from jaxft.hardware.topology import Topology, parse
from jaxft.planning.changes import changes_of
from jaxft.planning.job import AbstractStep, ShardedStep, abstract_step_of, recomputation_of, sharded_step_of
from jaxft.planning.result import plan_result
from jaxft.planning.rollout import RunCosts, estimate_run, measure_run
from jaxft.planning.search import search
from jaxft.planning.shapes import Length, length_of, shapes_of


def plan(config: RunConfig, topology: Topology, *, level: str, prices: str | None, length: Length) -> dict[str, Any]:
    """The plan of a config on a topology; with `changes` that would make it fit if it does not. See `jaxft.plan`."""
    price_of(topology.chip.name, prices)  # a missing price is an error before anything is compiled
    hf_config, shapes_from = shapes_of(config)

    def abstract(changed: RunConfig) -> AbstractStep:
        return abstract_step_of(changed, hf_config, length.steps)

    step, costs, recomputation = _measured(config, topology, level, abstract)
    options: dict[str, Any] = {"length": length, "shapes_from": shapes_from, "prices": prices}
    result = plan_result(step, costs, recomputation=recomputation, **options)
    if not result["fits"]:
        result["changes"] = changes_of(
            abstract,
            dataclasses.replace(step.config, model=config.model),
            topology,
            result["hbm_limit_bytes"],
            costs,
            estimate_run(sharded_step_of(abstract(step.config), step.config, topology, real=False)),
        )
    return result


def _measured(
    config: RunConfig, topology: Topology, level: str, abstract: Callable[[RunConfig], AbstractStep]
) -> tuple[ShardedStep, RunCosts, Recomputation | None]:
    """(the step, its costs, the choice of its policy if `model.remat` is `auto`).

    abstract: gives the step of a config. A policy with which the step does not fit is followed by the next one.
    """
    if config.model.remat != "auto":
        step = sharded_step_of(abstract(config), config, topology)
        return step, measure_run(step, level), None
    recomputation = recomputation_of(sharded_step_of(abstract(config), config, topology, real=False))
    while True:
        changed = with_policy(config, recomputation.policy)
        step = sharded_step_of(abstract(changed), changed, topology)
        costs = measure_run(step, level)
        update, chip = costs.update, topology.chip
        refused = update.refused is not None or update.memory.peak > chip.hbm_bytes // chip.devices
        if not refused or not recomputation.after:
            return step, costs, recomputation
        recomputation = recomputation.refused()


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
