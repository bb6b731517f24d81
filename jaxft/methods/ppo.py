"""Proximal policy optimization (PPO): a critic, trained beside the policy, says how good each sampled token was."""

# n answers, t sampled tokens of an answer

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft.adapters.critic import critic_values
from jaxft.config import RunConfig
from jaxft.data.batch import Batch
from jaxft.data.prompts import prepare_prompts
from jaxft.errors import ConfigError
from jaxft.methods.method import Method, Run
from jaxft.methods.online import settings as online
from jaxft.methods.online.credit import Credit, credit_of
from jaxft.methods.online.evaluation import evaluator
from jaxft.methods.online.feed import RolloutFeed, Updates
from jaxft.methods.online.passes import Passes
from jaxft.methods.online.updates import pack_groups, parts_of
from jaxft.methods.parts.charts import PPO_CHARTS
from jaxft.methods.parts.reference import check_reference, reference_state
from jaxft.methods.parts.router import router_coefficients
from jaxft.nn.decoder import Decoder
from jaxft.objectives.loss import Loss, LossSums, MethodState, NextSaved
from jaxft.objectives.policy.loss import ADVANTAGES, OLD_LOGPS, SAMPLER_LOGPS
from jaxft.objectives.policy.ppo import ppo_loss
from jaxft.objectives.policy.surrogate import PolicySettings
from jaxft.objectives.policy.value import RETURNS, VALUES
from jaxft.rollouts.judged import Judged
from jaxft.rollouts.packed import PackedRollouts
from jaxft.rollouts.size import RolloutSize, rollout_size
from jaxft.sharding.arrays import to_host
from jaxft.training.state import TrainState

# `Batch.values`, the same number everywhere: the mean divergence of the answers of the rollout from the reference.
ROLLOUT_KL = "rollout_kl"
# In `MethodState.saved`: the coefficient that is adapted.
KL_COEF = "kl_coef"
LARGEST_ERROR = 0.2


def check(config: RunConfig, model: Decoder) -> None:
    """Raises ConfigError for settings under which answers, reference or critic would not be what the loss expects."""
    online.check_online(config, model, compares=False)
    adapter = config.adapter
    if adapter.kind == "none":
        raise ConfigError(
            "method.name='ppo' trains a critic beside the policy as a second adapter on the same base, and "
            "adapter.kind='none' trains the base itself: train with an adapter, such as adapter.kind='lora'. "
            "method.name='grpo' needs no critic and trains all weights."
        )
    if adapter.virtual_tokens:
        raise ConfigError(
            f"method.name='ppo' gives the critic an adapter of the policy's kind, and adapter.kind={adapter.kind!r} "
            "puts virtual tokens into every row, which policy and critic cannot both do. Use adapter.kind='lora'."
        )
    if adapter.saved:
        raise ConfigError(
            f"method.name='ppo' keeps one base for policy and critic, and adapter.modules_to_save="
            f"{adapter.modules_to_save!r} would train modules of it for one and change the other. Set it to None."
        )
    if config.rollout.max_redraws:
        raise ConfigError(
            f"rollout.max_redraws={config.rollout.max_redraws} replaces groups whose rewards are all alike, from which "
            "method.name='ppo' learns as from others: its critic judges each answer by itself. Set it to 0."
        )
    check_reference(config)
    router_coefficients(config, model)


def feed(run: Run, graphdef: nnx.GraphDef[Decoder]) -> RolloutFeed:
    """`Method.feed`: answers, with the advantage and the return of each of their tokens."""
    return RolloutFeed(run, graphdef, make_updates, compares=False)


def make_updates(run: Run, judged: Judged, state: TrainState, passes: Passes) -> Updates:
    """The batches of one rollout. An answer without a score is not trained, but counts in the divergence."""
    own, parts = run.config.method.ppo, parts_of(run, judged.rollouts)
    packed = [pack_groups(run, [judged.rollouts[index] for index in part]) for part in parts]
    policy = [passes.policy_logps(state, one.batch) for one in packed]
    values = [passes.values(state, one.batch) for one in packed]
    ratios = None
    if own.kl_coef:
        reference = [passes.reference_logps(state, one.batch) for one in packed]
        ratios = by_answer(packed, [a - b for a, b in zip(policy, reference, strict=True)])
    credit = credit_of(
        judged,
        by_answer(packed, policy),
        ratios,
        by_answer(packed, values),
        gamma=own.gamma,
        lam=own.lam,
        kl_coef=kl_coefficient(run.config, state),
        kl_estimator=own.kl_estimator,
        whiten_rewards=own.whiten_rewards,
    )
    batches = [
        _batch(run.config, one, part, credit, logps, predicted)
        for one, part, logps, predicted in zip(packed, parts, policy, values, strict=True)
    ]
    return Updates(batches=tuple(batches), metrics=credit.metrics, numbers={"advantage": credit.means})


def by_answer(packed: Sequence[PackedRollouts], arrays_BS: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The values of every answer's tokens, answer after answer, from an array for each part of a rollout."""
    return [own for one, array_BS in zip(packed, arrays_BS, strict=True) for own in one.tokens_of(array_BS)]


def _batch(
    config: RunConfig,
    packed: PackedRollouts,
    part: np.ndarray,
    credit: Credit,
    logps_BS: np.ndarray,
    values_BS: np.ndarray,
) -> Batch[np.ndarray]:
    trained_BS = packed.by_token([credit.trained[index] for index in part])
    arrays = {
        OLD_LOGPS: logps_BS,
        ADVANTAGES: packed.by_token([credit.advantages[index] for index in part]),
        VALUES: values_BS.astype(np.float32),
        RETURNS: packed.by_token([credit.returns[index] for index in part]),
    }
    batch = packed.with_arrays(**arrays).batch
    batch = batch._replace(weights_BS=batch.weights_BS * trained_BS)
    if config.method.ppo.kl_target is None:
        return batch
    everywhere_BP = np.full_like(packed.by_document(np.zeros(len(part))), credit.divergence)
    return batch._replace(values=batch.values | {ROLLOUT_KL: everywhere_BP})


def kl_coefficient(config: RunConfig, state: TrainState) -> float:
    """The coefficient of the divergence, as it is adapted by now."""
    if state.method is None or state.method.saved is None:
        return config.method.ppo.kl_coef
    return float(to_host(state.method.saved[KL_COEF]))


def initial_state(config: RunConfig, trainable: nnx.State) -> MethodState | None:
    """The coefficient of the divergence, if it is adapted, and the reference, if it is no bare base."""
    own, reference = config.method.ppo, reference_state(config, trainable)
    if own.kl_target is None:
        return reference
    return (reference or MethodState())._replace(saved={KL_COEF: jnp.float32(own.kl_coef)})


def next_saved(config: RunConfig) -> NextSaved | None:
    """Adapts the coefficient at the last update of each rollout: by the error of the divergence, at most 0.2 of it.

    It is multiplied by 1 + error x answers / kl_horizon, with error = divergence / kl_target - 1 (arXiv:1909.08593,
    section 2.2).
    """
    target, rollout = config.method.ppo.kl_target, config.rollout
    if target is None:
        return None
    share = config.train.batch_size * rollout.steps_per_rollout / config.method.ppo.kl_horizon

    def adapted(saved: dict[str, jax.Array], step: jax.Array, batch: Batch[jax.Array]) -> dict[str, jax.Array]:
        # All numbers are the same, so that the largest depends on no order of devices.
        error = jnp.clip(jnp.max(batch.values[ROLLOUT_KL]) / target - 1, -LARGEST_ERROR, LARGEST_ERROR)
        last = step % rollout.updates == rollout.updates - 1
        return {KL_COEF: jnp.where(last, saved[KL_COEF] * (1 + error * share), saved[KL_COEF])}

    return adapted


def loss(config: RunConfig, model: Decoder) -> Loss:
    """`ppo_loss` with the settings of `method.ppo`."""
    own, router = config.method.ppo, router_coefficients(config, model)
    settings = PolicySettings(loss_type="dapo", epsilon=own.epsilon, temperature=config.rollout.temperature)

    def ppo(model: Decoder, batch: Batch[jax.Array], key: jax.Array | None, state: MethodState | None) -> LossSums:
        return ppo_loss(
            model,
            critic_values(model, batch),
            batch,
            key,
            settings,
            vf_coef=own.vf_coef,
            cliprange_value=own.cliprange_value,
            router=router,
        )

    return ppo


def batch_shapes(config: RunConfig) -> Batch[jax.ShapeDtypeStruct]:
    """`Method.batch_shapes`."""
    values = () if config.method.ppo.kl_target is None else (ROLLOUT_KL,)
    return online.batch_shapes(config, values, (SAMPLER_LOGPS, OLD_LOGPS, ADVANTAGES, VALUES, RETURNS))


def size_of_rollouts(config: RunConfig) -> RolloutSize | None:
    """The passes that `make_updates` needs: of the policy, of the critic, and of the reference if there is one."""
    return rollout_size(config, scoring_passes=2 + int(bool(config.method.ppo.kl_coef)))


def describe(config: RunConfig) -> str:
    """`PPO with kl_coef=0.05, 2 answers to each prompt`."""
    own, count = config.method.ppo, config.rollout.num_generations
    adapted = "" if own.kl_target is None else f" adapted to {own.kl_target:g} nats"
    answers = "1 answer" if count == 1 else f"{count} answers"
    return f"PPO with kl_coef={own.kl_coef:g}{adapted}, {answers} to each prompt"


METHOD = Method(
    prepare=prepare_prompts,
    source=online.source,
    feed=feed,
    batch_shapes=batch_shapes,
    check=check,
    initial_state=initial_state,
    next_saved=next_saved,
    loss=loss,
    evaluator=evaluator,
    describe=describe,
    loss_unit="mean over tokens, policy and critic",
    charts=PPO_CHARTS,
    # The critic's pass forward and back through the frozen base costs as much as two forward passes.
    reference_passes=lambda config: 2,
    frozen=online.reward_model_of,
    rewards=online.rewards,
    environments=online.environments,
    rollout_size=size_of_rollouts,
    critic=True,
    skips_empty=True,
    evaluates_start=True,
)
