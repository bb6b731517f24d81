"""What is known before a run costs money: whether it fits, what it takes, and what it costs at most."""

import importlib.util
import shlex
from collections.abc import Callable
from typing import Any

from jaxft.config import RunConfig
from jaxft.errors import ConfigError
from jaxft.planning.client import plan
from jaxft.pods.money import check_limit
from jaxft.pods.request import Request

GIB = 2**30


def check(request: Request, config: RunConfig, say: Callable[[str], None]) -> None:
    """Says what a run takes and what it costs at most. Raises ConfigError for one that would fail or cost too much.

    The run's own step is compiled for the slices that are requested, unless the request skips that. A dry run only
    names the command that does it.
    """
    request.check_config(config)
    rate = check_limit(request)
    if request.dry_run:
        say(f"does the step fit? {plan_command(request)}")
    elif not request.skip_plan:
        say(f"compiling the step for {request.shape.describe()}")
        say(_described(request, _fitting(request, config)))
    way = {"flex-start": ", at the price on demand", "reservation": ", at the price on demand"}.get(request.model, "")
    say(f"{rate.at_most(request.max_hours)}{way}, by prices of {rate.date}")


def plan_command(request: Request) -> str:
    """The command that plans the request."""
    config = [] if request.config is None else [f"--config={request.config}"]
    slices = [f"--slices={request.slices}"] if request.slices > 1 else []
    prices = [f"--prices={request.prices}"] if request.prices else []
    settings = [f"--config.{override}" for override in request.overrides]
    return shlex.join(["jaxft", "plan", *config, *settings, f"--topology={request.shape.name}", *slices, *prices])


def _fitting(request: Request, config: RunConfig) -> dict[str, Any]:
    """The plan of a run that fits. Raises ConfigError for one that does not, and without libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "the step is compiled for the slice before it is paid for, and libtpu is not installed. Run pip install "
            "'jaxft[plan]', or go on without knowing whether it fits: --skip_plan"
        )
    result = plan(config, request.shape.name, slices=request.slices, prices=request.prices)
    if result["fits"]:
        return result
    reason = result["refused"] or (
        f"it needs {result['hbm_peak_bytes'] / GIB:.2f} GiB of a device's {result['hbm_limit_bytes'] / GIB:.2f} GiB"
    )
    changes = result.get("changes") or []
    mend = f"Add {changes[0]['paste']}" if changes else f"See {plan_command(request)}"
    raise ConfigError(f"the run does not fit {request.shape.describe()}: {reason}. {mend}")


def _described(request: Request, result: dict[str, Any]) -> str:
    """The plan in one line; with a warning if its steps take longer than the machines may exist."""
    memory = f"{result['hbm_peak_bytes'] / GIB:.2f} of {result['hbm_limit_bytes'] / GIB:.2f} GiB a device"
    line = (
        f"it fits: {memory}, {result['step_seconds']:.2f} s a step, {result['steps']} steps in {result['hours']:.2f} h"
    )
    if result["hours"] > request.max_hours:
        line += f"; that is more than --max_hours={request.max_hours:g}, so raise it or the run will not finish"
    return line
