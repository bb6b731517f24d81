"""From the answers of a rollout, with their advantages, to the batches of its optimizer steps."""

# n answers

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from jaxft.methods.method import Run
from jaxft.methods.parts.router import router_coefficients
from jaxft.objectives.policy.denominators import UNITS
from jaxft.objectives.policy.loss import ADVANTAGES
from jaxft.objectives.policy.surrogate import LossType
from jaxft.rollouts.packed import PackedRollouts, pack_rollouts
from jaxft.rollouts.rollout import Rollout
from jaxft.rollouts.shared_prompts import pack_with_shared_prompts

# Sharing prompts costs attention some copies, so it must save this much: the largest share of rows that is left.
SAVES = 0.75


def parts_of(run: Run, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
    """The answers of each optimizer step, by index: whole groups, in turn."""
    return np.split(np.arange(len(rollouts)), run.config.rollout.steps_per_rollout)


def untrained_if_cut(one: Rollout) -> Rollout:
    """The answer; nothing of it is trained if it was cut off."""
    return one if one.finish_reason == "stop" else replace(one, sampled=np.zeros_like(one.sampled))


def units_of(loss_type: LossType, rollouts: Sequence[Rollout], max_completion_length: int) -> np.ndarray:
    """`answer_units` of the answers, float64 [n], on the host: before some of them are left out."""
    if loss_type in ("dapo", "bnpo", "cispo"):
        return np.array([float(one.sampled.sum()) for one in rollouts])
    return np.full(len(rollouts), float(max_completion_length) if loss_type == "dr_grpo" else 1.0)


def pack_part(
    run: Run, rollouts: Sequence[Rollout], advantages: np.ndarray, units: np.ndarray, *, keep_all: bool
) -> PackedRollouts:
    """The answers of one optimizer step as a batch. keep_all: whether answers whose advantage is 0 are trained too.

    Otherwise they are left out, which changes nothing but the work: their units stay in the denominator. If all of them
    are, the batch has one, and the step is skipped.
    """
    kept = np.flatnonzero((advantages != 0) | keep_all).tolist() or [0]
    own = units[kept].copy()
    own[0] += units.sum() - own.sum()
    packed = pack_groups(run, [rollouts[i] for i in kept])
    return packed.with_values(**{ADVANTAGES: packed.by_document(advantages[kept]), UNITS: packed.by_document(own)})


def pack(run: Run, rollouts: Sequence[Rollout], *, neighbors: int = 1) -> PackedRollouts:
    """The answers as a batch whose rows divide among micro-batches and devices. neighbors: see `pack_rollouts`."""
    return pack_rollouts(rollouts, **_sizes(run), packing=run.config.data.packing, neighbors=neighbors)


def pack_groups(run: Run, rollouts: Sequence[Rollout]) -> PackedRollouts:
    """As `pack`, but answers to one prompt share it if that saves a quarter of the rows.

    For losses that hand `Batch.whole` to the model: to others the later answers would have no prompt.
    """
    packed = pack(run, rollouts)
    if not shares_prompts(run):
        return packed
    shared = pack_with_shared_prompts(rollouts, **_sizes(run))
    rows, fewer = (len(one.batch.tokens_BS) for one in (packed, shared))
    return shared if fewer <= SAVES * rows else packed


def _sizes(run: Run) -> dict[str, int]:
    return {
        "max_length": run.config.data.max_length,
        "pad_id": run.tokenizer.pad_id,
        "multiple": run.config.train.accumulation_steps * run.mesh.batch_shards,
    }


def shares_prompts(run: Run) -> bool:
    """Whether the answers to a prompt may share it in an update.

    Not if rows are divided over the context axis, as attention needs the rows of whole documents on one device, or if
    there are losses of routers, which count every token of an answer.
    """
    config = run.config
    if not (config.rollout.share_prompts and config.data.packing):
        return False
    return run.mesh.axes.get("context", 1) == 1 and router_coefficients(config, run.model) is None
