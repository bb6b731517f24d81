"""Group relative policy optimization (GRPO) and its relatives: answers learn from how their rewards differ."""

from functools import partial

import jax
import numpy as np
from flax import nnx

from jaxft.config import RunConfig
from jaxft.data.batch import Batch
from jaxft.data.prompts import prepare_prompts
from jaxft.errors import ConfigError
from jaxft.methods.method import Method, Run
from jaxft.methods.online import settings as online
from jaxft.methods.online.evaluation import evaluator
from jaxft.methods.online.feed import RolloutFeed, Updates
from jaxft.methods.online.passes import Passes
from jaxft.methods.online.updates import pack_part, parts_of, units_of, untrained_if_cut
from jaxft.methods.parts.charts import REWARD_CHARTS
from jaxft.methods.parts.reference import check_reference, reference_model, reference_state
from jaxft.methods.parts.router import router_coefficients
from jaxft.nn.decoder import Decoder
from jaxft.objectives.loss import BatchSums, Loss, LossSums, MethodState
from jaxft.objectives.policy.advantages import group_advantages
from jaxft.objectives.policy.denominators import UNITS, policy_counts
from jaxft.objectives.policy.loss import ADVANTAGES, OLD_LOGPS, SAMPLER_LOGPS, policy_logps, policy_loss
from jaxft.objectives.policy.surrogate import PolicySettings
from jaxft.rollouts.judged import Judged
from jaxft.training.state import TrainState


def policy_settings(config: RunConfig) -> PolicySettings:
    """The settings of the loss."""
    own = config.method.grpo
    return PolicySettings(
        loss_type=own.loss_type,
        importance_sampling_level=own.importance_sampling_level,
        epsilon=own.epsilon,
        epsilon_high=own.epsilon_high,
        delta=own.delta,
        beta=own.beta,
        kl_estimator=own.kl_estimator,
        importance_cap=own.importance_cap,
        entropy_coef=own.entropy_coef,
        temperature=config.rollout.temperature,
        max_completion_length=config.rollout.max_completion_length,
    )


def check(config: RunConfig, model: Decoder) -> None:
    """Raises ConfigError for settings under which answers, or the reference, would not be what the loss expects."""
    online.check_online(config, model)
    own = config.method.grpo
    if own.beta:
        check_reference(config)
    if own.loss_type == "cispo" and own.epsilon_high is None:
        raise ConfigError(
            "method.grpo.loss_type='cispo' limits the ratio itself to epsilon_high, which is None: set "
            "method.grpo.epsilon_high, for example to 5.0"
        )
    router_coefficients(config, model)


def feed(run: Run, graphdef: nnx.GraphDef[Decoder]) -> RolloutFeed:
    """`Method.feed`: groups of answers, with the advantages of each group."""
    return RolloutFeed(run, graphdef, make_updates)


def make_updates(run: Run, judged: Judged, state: TrainState, passes: Passes) -> Updates:
    """The batches of one rollout: advantages of all answers, then a part of the groups for each optimizer step."""
    config, own = run.config, run.config.method.grpo
    advantages = group_advantages(judged.rewards, judged.groups, own.scale_rewards)
    rollouts = [untrained_if_cut(one) if own.mask_truncated_completions else one for one in judged.rollouts]
    units = units_of(own.loss_type, rollouts, config.rollout.max_completion_length)
    batches = []
    for part in parts_of(run, rollouts):
        packed = pack_part(run, [rollouts[i] for i in part], advantages[part], units[part], keep_all=own.beta > 0)
        if config.rollout.updates > 1:
            packed = packed.with_arrays(**{OLD_LOGPS: passes.policy_logps(state, packed.batch)})
        batches.append(packed.batch)
    metrics = {"advantages/absolute_mean": float(np.mean(np.abs(advantages)))}
    return Updates(batches=tuple(batches), metrics=metrics, numbers={"advantage": advantages})


def batch_sums(config: RunConfig, model: Decoder) -> BatchSums | None:
    """The counts of the whole batch, if there is an entropy bonus."""
    settings = policy_settings(config)
    return (lambda model, batch, state: policy_counts(batch, settings)) if settings.entropy_coef else None


def loss(config: RunConfig, model: Decoder) -> Loss:
    """`policy_loss` with the settings of `method.grpo`, against the reference if beta is not 0."""
    settings, router = policy_settings(config), router_coefficients(config, model)

    def grpo(model: Decoder, batch: Batch[jax.Array], key: jax.Array | None, state: MethodState | None) -> LossSums:
        reference_BS = None
        if settings.beta:
            logps_BS = policy_logps(reference_model(model, state), batch, temperature=settings.temperature)
            reference_BS = jax.lax.stop_gradient(logps_BS)
        counts = None if state is None else state.batch
        return policy_loss(model, batch, key, settings, reference_BS=reference_BS, counts=counts, router=router)

    return grpo


def initial_state(config: RunConfig, trainable: nnx.State) -> MethodState | None:
    """The frozen copy of the reference, if there is a reference and it is not the base."""
    return reference_state(config, trainable) if config.method.grpo.beta else None


def describe(config: RunConfig) -> str:
    """`GRPO (dapo) of 8 answers to each prompt`."""
    return f"GRPO ({config.method.grpo.loss_type}) of {config.rollout.num_generations} answers to each prompt"


METHOD = Method(
    prepare=prepare_prompts,
    source=online.source,
    feed=feed,
    batch_shapes=partial(online.batch_shapes, values=(ADVANTAGES, UNITS), arrays=(SAMPLER_LOGPS,)),
    check=check,
    initial_state=initial_state,
    batch_sums=batch_sums,
    loss=loss,
    evaluator=evaluator,
    describe=describe,
    loss_unit="by its loss_type",
    charts=REWARD_CHARTS,
    reference_passes=lambda config: 1 if config.method.grpo.beta else 0,
    frozen=online.reward_model_of,
    rewards=online.rewards,
    environments=online.environments,
    skips_empty=True,
    evaluates_start=True,
)
