"""In how many parts the batch of a step goes through the devices, so that each fits into their memory."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from jaxft.config import RunConfig
from jaxft.config.model import Policy
from jaxft.errors import ConfigError
from jaxft.hardware.recomputation import MARGIN
from jaxft.runs.build import abstract_model, make_mesh
from jaxft.runs.memory.recomputation import ON_CPU, estimate_of

QUICK: tuple[Policy, ...] = ("none", "dots", "attention", "full")  # of which `model.remat='auto'` takes one that fits


@dataclass(frozen=True, kw_only=True)
class Parts:
    """number: `train.accumulation_steps`. peak: bytes of one device, by arithmetic. limit: those that it has."""

    number: int
    peak: int
    limit: int

    @property
    def fits(self) -> bool:
        """Whether the peak leaves a margin, since the compiler may need more."""
        return self.peak <= MARGIN * self.limit


def fewest_parts(config: RunConfig, devices: Sequence[jax.Device], limit: int, *, steps: int) -> Parts:
    """The fewest equal parts of the batch of which one fits into `limit` bytes of a device; if none does, the most.

    The batch of a step stays as configured, since it changes what is learned. By the arithmetic of `jaxft plan`, with
    the policy of the config, or with any of QUICK if that is `auto`. Raises the errors of `abstract_model` and
    `make_mesh`.
    """
    model, rows = abstract_model(config), config.train.batch_size
    parts: Parts | None = None
    for number in range(1, rows + 1):
        if rows % number:
            continue
        divided = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation_steps=number))
        try:
            mesh = make_mesh(divided, model, devices)
            mesh.check_batch(rows // number)
        except ConfigError:
            if parts is None:
                raise
            break  # smaller parts do not divide over the devices either
        estimate = estimate_of(divided, model, mesh, steps=steps)
        peak = min(estimate(policy)[0] for policy in policies(config, devices))
        parts = Parts(number=number, peak=peak, limit=limit)
        if parts.fits:
            break
    if parts is None:
        raise ConfigError("train.batch_size must be at least 1")
    return parts


def policies(config: RunConfig, devices: Sequence[jax.Device]) -> tuple[Policy, ...]:
    """Those that a run may take."""
    if config.model.remat != "auto":
        return (config.model.remat,)
    return (ON_CPU,) if devices[0].platform == "cpu" else QUICK
