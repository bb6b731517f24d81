"""Memory and work of a step by arithmetic, from the sizes of a model and one device's part of a step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxft.config import RunConfig
from jaxft.config.model import Policy
from jaxft.hardware import analytic
from jaxft.hardware.compile import Memory
from jaxft.hardware.costs import Costs
from jaxft.hardware.recomputation import with_policy
from jaxft.hardware.sizes import ModelSizes
from jaxft.methods import method_of


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """What an estimate reads beside the config.

    references: sizes of the frozen models that each step runs forward. arguments: bytes of one device's part of the
    state and the batch.
    """

    model: ModelSizes
    references: Sequence[ModelSizes]
    cut: analytic.Cut
    arguments: int

    @property
    def devices(self) -> int:
        """Number of devices of the mesh."""
        return math.prod(self.cut.axes.values())


def model_flops_of(config: RunConfig, sizes: StepSizes) -> int:
    """FLOPs of one device in one step, recomputation left out."""
    rows, length = config.train.batch_size, config.data.max_length
    flops = sizes.model.model_flops(rows, length)
    flops += sum(reference.forward_flops(rows, length) for reference in sizes.references)
    return flops // sizes.devices


def memory_of(config: RunConfig, sizes: StepSizes) -> Memory:
    """Memory of one device."""
    passes = 2 if method_of(config).critic else 1
    return analytic.memory_of(config, sizes.model, sizes.cut, sizes.arguments, passes=passes)


def costs_of(config: RunConfig, sizes: StepSizes) -> Costs:
    """Work and traffic of one step on one device."""
    flops = model_flops_of(config, sizes)
    return analytic.costs_of(config, sizes.model, sizes.cut, sizes.arguments, flops, references=sizes.references)


def with_recomputation(config: RunConfig, sizes: StepSizes, policy: Policy) -> tuple[int, float]:
    """(bytes of one device at its peak, FLOPs of a step by those of the model's own products) with a policy."""
    changed = with_policy(config, policy)
    products = costs_of(changed, sizes).flops - analytic.waiting_flops(changed, sizes.model, sizes.cut)
    return memory_of(changed, sizes).peak, products / model_flops_of(changed, sizes)
