"""A run's step with its rollouts: peak of memory, seconds of each part, and the slots that would fit."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jaxft.generation.steps import RUN
from jaxft.hardware.roofline import StepTime
from jaxft.methods import method_of
from jaxft.planning.decoding import Decoding, decoding_of
from jaxft.planning.decoding_costs import (
    SamplingCosts,
    copy_costs,
    estimate_sampling,
    measure_sampling,
    scoring_costs,
)
from jaxft.planning.job import ShardedStep, StepCosts, estimate_step, measure, time_of

MOST_SLOTS = 2**16  # of the search for the slots that fit


@dataclass(frozen=True, kw_only=True)
class RolloutCosts:
    """What a run samples between its updates. slots: that the config leads to. state: bytes of the state of training on
    one device. trained: the step in the layout of training.
    """

    decoding: Decoding
    slots: int
    state: int
    sampling: SamplingCosts
    trained: ShardedStep

    @property
    def peak(self) -> int:
        """Bytes that must be in one device's memory while answers are sampled."""
        return self.sampling.memory.peak

    def seconds(self, update: float) -> dict[str, float]:
        """Seconds of the parts of one rollout and of the updates that it serves. update: seconds of one update.

        Without the time of reward functions, and as if every answer were as long as it may be.
        """
        size, decoding = self.decoding.size, self.decoding
        prompts, answers = decoding.group(self.slots)
        calls = math.ceil(size.prompts * math.ceil(size.group / answers) / prompts)
        passes = size.scoring_passes * size.batches
        return {
            "weights": time_of(self.trained, copy_costs(decoding, self.trained)).total,
            "prefill": calls * time_of(decoding.step, self.sampling.prefill).total,
            "decode": self.decode_steps * self.token_seconds,
            "scoring": passes * time_of(self.trained, scoring_costs(self.trained)).total if passes else 0.0,
            "update": size.updates * update,
        }

    @property
    def decode_steps(self) -> int:
        """Decoding steps of one rollout."""
        size = self.decoding.size
        return math.ceil(size.answers / self.slots) * size.max_completion_length

    @cached_property
    def token_seconds(self) -> float:
        """Seconds of a decoding step: one token of every slot."""
        return time_of(self.decoding.step, self.sampling.decode).total / RUN

    def slots_that_fit(self, limit: int) -> int | None:
        """The most slots with which sampling fits into `limit` bytes; None if it fits with none.

        What is kept is exact, and temporaries are scaled by the ratio of those measured to the estimated ones.
        """
        multiple = self.decoding.multiple
        fitting = _most(MOST_SLOTS // multiple, lambda count: self.peak_with(count * multiple) <= limit)
        return fitting * multiple or None

    def peak_with(self, slots: int) -> int:
        """Bytes of one device with another number of slots."""
        estimate = estimate_sampling(self.decoding, slots, state=self.state).memory
        kept = self.sampling.memory.arguments - self.decoding.cache_bytes(self.slots)
        return int(kept + self.decoding.cache_bytes(slots) + self.scale * (estimate.peak - estimate.arguments))

    @cached_property
    def scale(self) -> float:
        """Temporaries by their estimate."""
        estimate, memory = estimate_sampling(self.decoding, self.slots, state=self.state).memory, self.sampling.memory
        return (memory.peak - memory.arguments) / max(1, estimate.peak - estimate.arguments)


@dataclass(frozen=True, kw_only=True)
class RunCosts:
    """The costs of an update, its time, and those of the rollouts between updates, if there are any."""

    update: StepCosts
    time: StepTime
    rollout: RolloutCosts | None

    @property
    def peak(self) -> int:
        """Bytes that must be in one device's memory: updates and sampling take turns, so that the larger counts."""
        return max(self.update.memory.peak, self.rollout.peak if self.rollout else 0)

    @property
    def arguments(self) -> int:
        """Bytes of the state and the batch."""
        return self.update.memory.arguments

    @cached_property
    def parts(self) -> dict[str, float]:
        """Seconds of one rollout and the updates that it serves, by part."""
        return {"update": self.time.total} if self.rollout is None else self.rollout.seconds(self.time.total)

    @property
    def seconds(self) -> float:
        """Seconds of an optimizer step, with its share of a rollout."""
        return sum(self.parts.values()) / (1 if self.rollout is None else self.rollout.decoding.size.updates)

    @property
    def refused(self) -> str | None:
        """The compiler's message about a program that is too large; None if there is none."""
        return self.update.refused or (self.rollout.sampling.refused if self.rollout else None)

    def scaled_peak(self, measured: "RunCosts", estimate: "RunCosts") -> int:
        """The peak of these estimated costs if they are as far from what a compiler finds as `estimate`, of another
        config, is from `measured`.
        """
        peaks = [_scaled(self.update.memory, measured.update.memory, estimate.update.memory)]
        if self.rollout and measured.rollout and estimate.rollout:
            memories = (one.rollout.sampling.memory for one in (self, measured, estimate) if one.rollout)
            peaks.append(_scaled(*memories))
        return max(peaks)


def _scaled(memory: Any, measured: Any, estimate: Any) -> int:
    scale = (measured.peak - measured.arguments) / max(1, estimate.peak - estimate.arguments)
    return int(memory.arguments + scale * (memory.peak - memory.arguments))


def measure_run(step: ShardedStep, level: str) -> RunCosts:
    """The costs by the compiler for TPUs, else by arithmetic. level: see `hardware.compile.LEVELS`."""
    update = measure(step, level)

    def sampling(decoding: Decoding, slots: int, state: int) -> SamplingCosts:
        return measure_sampling(decoding, slots, state=state, level=level)

    return _run_costs(step, update, sampling)


def estimate_run(step: ShardedStep, decoding: Decoding | None = None) -> RunCosts:
    """The costs by arithmetic. decoding: that of this step, if it is known already."""

    def sampling(decoding: Decoding, slots: int, state: int) -> SamplingCosts:
        return estimate_sampling(decoding, slots, state=state)

    return _run_costs(step, estimate_step(step), sampling, decoding)


def decoding_of_run(step: ShardedStep) -> Decoding | None:
    """How the run of a step decodes; None if its method samples nothing. Raises ConfigError as `decoding_of`."""
    size = method_of(step.config).rollout_size(step.config)
    return None if size is None else decoding_of(step, size)


def _run_costs(
    step: ShardedStep,
    update: StepCosts,
    sampling: Callable[[Decoding, int, int], SamplingCosts],
    decoding: Decoding | None = None,
) -> RunCosts:
    time = time_of(step, update.costs)
    decoding = decoding or decoding_of_run(step)
    if decoding is None:
        return RunCosts(update=update, time=time, rollout=None)
    slots, state = decoding.slots_of(decoding.size.slots), update.memory.arguments - step.parts().batch
    rollout = RolloutCosts(
        decoding=decoding, slots=slots, state=state, sampling=sampling(decoding, slots, state), trained=step
    )
    return RunCosts(update=update, time=time, rollout=rollout)


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that fits, if all smaller ones do; 0 if none does."""
    below, above = 0, limit + 1
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if fits(middle) else (below, middle)
    return below


def assumptions(rollout: RolloutCosts) -> list[str]:
    """What the seconds of a rollout take for granted, in words."""
    size = rollout.decoding.size
    lines = [
        f"every answer has {size.max_completion_length} tokens, the most that the config permits",
        f"every prompt has {size.prompt_length} tokens, the most that leaves room for an answer",
        "exchanges between devices and loops over rows take as long as their bytes, without the delay of each of them",
    ]
    if size.updates != int(size.updates):
        lines.append(f"one step of {size.updates:.2f} samples, on average")
    return lines


def rollout_result(costs: RunCosts, limit: int) -> dict[str, Any] | None:
    """The entry `rollout` of a plan; None for a method that samples nothing. limit: bytes of one device."""
    rollout = costs.rollout
    if rollout is None:
        return None
    decoding, size, memory = rollout.decoding, rollout.decoding.size, rollout.sampling.memory
    tokens = rollout.slots / rollout.token_seconds
    return {
        "prompts": size.prompts,
        "answers": size.answers,
        "max_completion_length": size.max_completion_length,
        "updates": size.updates,
        "slots": rollout.slots,
        "slots_that_fit": rollout.slots_that_fit(limit),
        "cache_length": decoding.length,
        "mesh": decoding.step.mesh.axes,
        "fits": rollout.sampling.refused is None and rollout.peak <= limit,
        "compiled": rollout.sampling.compiled,
        "refused": rollout.sampling.refused,
        "hbm_peak_bytes": rollout.peak,
        "state_bytes": rollout.state,
        "copy_bytes": decoding.copy_bytes,
        "cache_bytes": decoding.cache_bytes(rollout.slots),
        "temp_bytes": memory.temporaries + memory.outputs - memory.aliased + memory.code,
        "seconds": costs.parts,
        "longest_part": max(costs.parts, key=lambda part: costs.parts[part]),
        "decode_steps": rollout.decode_steps,
        "decode_step_seconds": rollout.token_seconds,
        "tokens_per_second": tokens,
        "assumed": assumptions(rollout),
    }
