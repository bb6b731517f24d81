"""Online DPO: of the answers that the model samples to a prompt, the best is learned as preferred to the worst."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
from flax import nnx

from jaxft.config import RunConfig
from jaxft.data import Prepared, Tokenizer
from jaxft.data.batch import Batch
from jaxft.data.prompts import prepare_prompts
from jaxft.errors import ConfigError
from jaxft.methods.method import Method, Run
from jaxft.methods.online import settings as online
from jaxft.methods.online.evaluation import evaluator
from jaxft.methods.online.feed import RolloutFeed, Updates
from jaxft.methods.online.passes import Passes
from jaxft.methods.online.updates import pack, parts_of
from jaxft.methods.parts.charts import PAIR_CHARTS, REWARD_CHARTS
from jaxft.methods.parts.reference import check_reference, reference_logps, reference_state
from jaxft.methods.parts.router import router_coefficients
from jaxft.nn.decoder import Decoder
from jaxft.objectives.dpo import DPOSettings, dpo_loss
from jaxft.objectives.loss import Loss, LossSums, MethodState
from jaxft.objectives.pairs import answer_logps
from jaxft.objectives.policy.loss import SAMPLER_LOGPS
from jaxft.rollouts.judged import Judged
from jaxft.rollouts.size import rollout_size
from jaxft.training.state import TrainState


def check(config: RunConfig, model: Decoder) -> None:
    """Raises ConfigError for settings under which answers, or the reference, would not be what the loss expects."""
    online.check_online(config, model)
    check_reference(config)
    if config.rollout.updates > 1:
        raise ConfigError(
            f"method.name='online_dpo' prefers answers of the model itself, but after the first of "
            f"{config.rollout.updates} steps on a rollout they are those of an earlier one: set "
            "rollout.steps_per_rollout and rollout.num_iterations to 1"
        )
    router_coefficients(config, model)


def prepare(config: RunConfig, tokenizer: Tokenizer) -> Prepared:
    """`prepare_prompts`, with room for both answers of a pair, each after its prompt, in one sequence."""
    half = config.data.max_length // 2
    if half <= config.rollout.max_completion_length:
        raise ConfigError(
            f"data.max_length={config.data.max_length} must hold both answers of a pair, each after its prompt, and "
            f"rollout.max_completion_length={config.rollout.max_completion_length} leaves no room for prompts: raise "
            "the former or lower the latter"
        )
    return prepare_prompts(replace(config, data=replace(config.data, max_length=half)), tokenizer)


def feed(run: Run, graphdef: nnx.GraphDef[Decoder]) -> RolloutFeed:
    """`Method.feed`: the best and the worst answer of each group."""
    return RolloutFeed(run, graphdef, make_updates, answers_of_sequence=2)


def make_updates(run: Run, judged: Judged, state: TrainState, passes: Passes) -> Updates:
    """The batches of one rollout: a pair of each group whose rewards differ. The others are ties, and left out."""
    batches, chosen = [], np.zeros(len(judged.rollouts))
    count = 0
    for part in parts_of(run, judged.rollouts):
        pairs = best_and_worst(judged.rewards[part], judged.groups[part])
        for best, worst in pairs:
            chosen[part[best]], chosen[part[worst]] = 1, -1
        count += len(pairs)
        answers = [judged.rollouts[part[index]] for pair in pairs for index in pair]
        if not answers:
            # Nothing is trained in these two, so the step is skipped.
            answers = [replace(one, sampled=np.zeros_like(one.sampled)) for one in judged.rollouts[:2]]
        batches.append(pack(run, answers, neighbors=2).batch)
    groups = len(set(judged.groups.tolist()))
    return Updates(
        batches=tuple(batches), metrics={"pairs": float(count), "ties": float(groups - count)},
        numbers={"preferred": chosen},
    )  # fmt: skip


def best_and_worst(rewards: np.ndarray, groups: np.ndarray) -> list[tuple[int, int]]:
    """(best, worst) answer of every group, by index; the first ones of equal rewards.

    A group in which all rewards are the same has neither. rewards: NaN for answers that were not scored.
    """
    pairs = []
    for group in np.unique(groups):
        members = np.flatnonzero((groups == group) & ~np.isnan(rewards))
        if len(members) and rewards[members].max() > rewards[members].min():
            best, worst = np.argmax(rewards[members]), np.argmin(rewards[members])
            pairs.append((int(members[best]), int(members[worst])))
    return pairs


def loss(config: RunConfig, model: Decoder) -> Loss:
    """`dpo_loss` with the settings of `method.online_dpo`, against the reference."""
    own, router = config.method.online_dpo, router_coefficients(config, model)
    settings = DPOSettings(beta=own.beta, losses=((own.loss_type, 1.0),))

    def online_dpo(
        model: Decoder, batch: Batch[jax.Array], key: jax.Array | None, state: MethodState | None
    ) -> LossSums:
        reference_BP = reference_logps(model, batch, state, answer_logps)
        return dpo_loss(model, reference_BP, batch, key, settings, router=router)

    return online_dpo


def describe(config: RunConfig) -> str:
    """`online DPO with beta=0.1`."""
    return f"online DPO with beta={config.method.online_dpo.beta:g}"


METHOD = Method(
    prepare=prepare,
    source=online.source,
    feed=feed,
    batch_shapes=partial(online.batch_shapes, values=(), arrays=(SAMPLER_LOGPS,)),
    check=check,
    initial_state=reference_state,
    loss=loss,
    evaluator=evaluator,
    describe=describe,
    loss_unit="mean over pairs",
    charts=(*REWARD_CHARTS[:4], *PAIR_CHARTS),
    reference_passes=lambda config: 1,
    frozen=online.reward_model_of,
    rewards=online.rewards,
    rollout_size=partial(rollout_size, answers_of_sequence=2),
    environments=online.environments,
    skips_empty=True,
    evaluates_start=True,
)
