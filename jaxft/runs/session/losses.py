"""The losses of a `Session`: those of methods, and those that a caller writes over log-probabilities."""

# B rows of a batch, S sequence

import dataclasses
from typing import Literal, cast, get_args

import jax
import jax.numpy as jnp

from jaxft.config import RunConfig
from jaxft.data.batch import Batch
from jaxft.errors import ConfigError, did_you_mean
from jaxft.methods import method_of
from jaxft.methods.parts.reference import check_reference
from jaxft.nn.decoder import Decoder
from jaxft.objectives.loss import Loss, LossSums, MethodState
from jaxft.objectives.policy.loss import policy_logps

Name = Literal["sft", "grpo", "rloo"]
LOSSES = get_args(Name)
SLOPES = "slopes"  # `Batch.arrays`: the gradient of a caller's loss by the log-probability of each token


def check_session(config: RunConfig) -> None:
    """Raises ConfigError for settings of whole runs, which need rows or arrays that a Session does not have."""
    if config.method.name not in LOSSES:
        raise ConfigError(
            f"method.name={config.method.name!r} has rows or arrays of its own, which a Session does not make. Set it "
            f"to one of {', '.join(LOSSES)}; losses on pairs can be given as functions of log-probabilities."
        )
    if config.train.on_spike != "off":
        raise ConfigError(
            f"train.on_spike={config.train.on_spike!r} compares the steps of a whole run: leave it out, and look at "
            "the loss and grad_norm that forward_backward and optim_step return"
        )
    if config.train.matmul_dtype is not None:
        raise ConfigError(
            f"train.matmul_dtype={config.train.matmul_dtype!r} was tested in whole runs alone: set it to None"
        )
    if config.adapter.by_data:
        raise ConfigError(
            f"adapter.init_lora_weights={config.adapter.init_lora_weights!r} is made from the rows of a run, which a "
            "Session has not seen yet. Set it to 'default'."
        )


def loss_of(name: str, config: RunConfig, model: Decoder) -> Loss:
    """The loss of a method, with the settings of its section. model: abstract.

    Raises ConfigError for an unknown name, and for settings with which the loss cannot be used in single calls.
    """
    if name not in LOSSES:
        raise ConfigError(
            f"loss={name!r} is not one of {', '.join(LOSSES)}.{did_you_mean(name, LOSSES)} Other losses can be given "
            "as functions of log-probabilities."
        )
    named = dataclasses.replace(config.method, name=cast(Name, name))
    own = dataclasses.replace(config, method=named)
    method = method_of(own)
    if name != "sft":
        _check_policy(name, own, kept=config.method.name)
    if method.batch_sums(own, model) is not None:
        raise ConfigError(
            f"loss={name!r} with these settings needs numbers of the whole batch, which single calls do not have: set "
            f"method.{name}.entropy_coef to 0"
        )
    return method.loss(own, model)


def linear_loss(
    model: Decoder, batch: Batch[jax.Array], key: jax.Array | None, state: MethodState | None, *, temperature: float
) -> LossSums:
    """The log-probabilities of tokens times arrays[SLOPES], whose gradient is that of the loss the slopes come from.

    The total and the weight are not those of that loss: the weight is 0.
    """
    logps_BS = policy_logps(model, batch, temperature=temperature)
    return LossSums(
        total=jnp.sum(logps_BS * batch.arrays[SLOPES]),
        weight=jnp.float32(0),
        tokens=jnp.sum(batch.segments_BS > 0).astype(jnp.float32),
        trained_tokens=jnp.sum(batch.weights_BS),
        metrics={},
    )


def _check_policy(name: str, config: RunConfig, kept: str) -> None:
    """kept: the method whose arrays, such as a copy of the reference, the session has."""
    if config.adapter.kind != "none" and config.adapter.dropout:
        raise ConfigError(
            f"adapter.dropout={config.adapter.dropout} would change the log-probabilities of answers after they were "
            f"sampled without it, so loss={name!r} cannot compare them. Set it to 0."
        )
    if name == "rloo" and config.method.rloo.beta:
        raise ConfigError(
            f"method.rloo.beta={config.method.rloo.beta} is taken from the rewards before the loss: set it to 0, and "
            "take the divergence from the rewards of which the advantages are made"
        )
    if name != "grpo":
        return
    if config.method.grpo.mask_truncated_completions:
        raise ConfigError(
            "method.grpo.mask_truncated_completions leaves answers out by their finish_reason, before the loss: set it "
            "to False, and give forward_backward only answers that ended with `stop`"
        )
    if config.method.grpo.beta:
        check_reference(config)
        if config.adapter.kind == "none" and kept != "grpo":
            raise ConfigError(
                "method.grpo.beta compares the weights with a copy of them at the start, which is kept only with "
                "method.name='grpo': set it"
            )
