"""REINFORCE leave-one-out (RLOO): an answer's advantage is its reward less the mean of the others to its prompt."""

from functools import partial

import jax
import numpy as np
from flax import nnx

from jaxft.config import RunConfig
from jaxft.data.batch import Batch
from jaxft.data.prompts import prepare_prompts
from jaxft.methods.method import Method, Run
from jaxft.methods.online import settings as online
from jaxft.methods.online.evaluation import evaluator
from jaxft.methods.online.feed import RolloutFeed, Updates
from jaxft.methods.online.passes import Passes
from jaxft.methods.online.updates import pack_groups, parts_of
from jaxft.methods.parts.charts import REWARD_CHARTS
from jaxft.methods.parts.reference import check_reference, reference_state
from jaxft.methods.parts.router import router_coefficients
from jaxft.nn.decoder import Decoder
from jaxft.objectives.loss import Loss, LossSums, MethodState
from jaxft.objectives.policy.advantages import leave_one_out, penalized_rewards
from jaxft.objectives.policy.loss import ADVANTAGES, OLD_LOGPS, SAMPLER_LOGPS, policy_loss
from jaxft.objectives.policy.surrogate import rloo_settings
from jaxft.rollouts.judged import Judged
from jaxft.rollouts.size import RolloutSize, rollout_size
from jaxft.training.state import TrainState


def check(config: RunConfig, model: Decoder) -> None:
    """Raises ConfigError for settings under which answers, or the reference, would not be what the loss expects."""
    online.check_online(config, model)
    if config.method.rloo.beta:
        check_reference(config)
    router_coefficients(config, model)


def feed(run: Run, graphdef: nnx.GraphDef[Decoder]) -> RolloutFeed:
    """`Method.feed`: groups of answers, with their advantages."""
    return RolloutFeed(run, graphdef, make_updates)


def make_updates(run: Run, judged: Judged, state: TrainState, passes: Passes) -> Updates:
    """The batches of one rollout. The KL penalty of an answer is part of its reward, as it is when it was sampled."""
    config, own = run.config, run.config.method.rloo
    parts = parts_of(run, judged.rollouts)
    packed = [pack_groups(run, [judged.rollouts[index] for index in part]) for part in parts]
    rewards, metrics = judged.rewards, {}
    if own.beta or config.rollout.updates > 1:
        policy = [passes.policy_logps(state, one.batch) for one in packed]
    if own.beta:
        both = [
            (one, logps, passes.reference_logps(state, one.batch)) for one, logps in zip(packed, policy, strict=True)
        ]
        log_ratios = [x for one, logps, reference in both for x in one.tokens_of(logps - reference)]
        rewards = penalized_rewards(judged.rewards, log_ratios, own.beta)
        sampled = np.concatenate([one.sampled for one in judged.rollouts])
        metrics["kl"] = float(np.concatenate(log_ratios)[sampled].mean())
    advantages = leave_one_out(rewards, judged.groups, normalize=own.normalize_advantages)
    packed = [
        one.with_values(**{ADVANTAGES: one.by_document(advantages[part])})
        for one, part in zip(packed, parts, strict=True)
    ]
    if config.rollout.updates > 1:
        packed = [one.with_arrays(**{OLD_LOGPS: logps}) for one, logps in zip(packed, policy, strict=True)]
    metrics["advantages/absolute_mean"] = float(np.mean(np.abs(advantages)))
    return Updates(batches=tuple(one.batch for one in packed), metrics=metrics, numbers={"advantage": advantages})


def loss(config: RunConfig, model: Decoder) -> Loss:
    """`policy_loss` of whole answers with the settings of `method.rloo`."""
    own, router = config.method.rloo, router_coefficients(config, model)
    settings = rloo_settings(epsilon=own.epsilon, epsilon_high=own.epsilon_high, temperature=config.rollout.temperature)

    def rloo(model: Decoder, batch: Batch[jax.Array], key: jax.Array | None, state: MethodState | None) -> LossSums:
        return policy_loss(model, batch, key, settings, router=router)

    return rloo


def initial_state(config: RunConfig, trainable: nnx.State) -> MethodState | None:
    """The frozen copy of the reference, if there is a reference and it is not the base."""
    return reference_state(config, trainable) if config.method.rloo.beta else None


def size_of_rollouts(config: RunConfig) -> RolloutSize | None:
    """The passes that `make_updates` needs: of the policy, and of the reference if there is one."""
    own = config.method.rloo
    policy = bool(own.beta) or config.rollout.updates > 1
    return rollout_size(config, scoring_passes=int(policy) + int(bool(own.beta)))


def describe(config: RunConfig) -> str:
    """`RLOO of 8 answers to each prompt`."""
    return f"RLOO of {config.rollout.num_generations} answers to each prompt"


METHOD = Method(
    prepare=prepare_prompts,
    source=online.source,
    feed=feed,
    batch_shapes=partial(online.batch_shapes, values=(ADVANTAGES,), arrays=(SAMPLER_LOGPS,)),
    check=check,
    initial_state=initial_state,
    loss=loss,
    evaluator=evaluator,
    describe=describe,
    loss_unit="mean over answers",
    charts=REWARD_CHARTS,
    frozen=online.reward_model_of,
    rewards=online.rewards,
    environments=online.environments,
    rollout_size=size_of_rollouts,
    skips_empty=True,
    evaluates_start=True,
)
