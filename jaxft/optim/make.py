"""Optimizers and learning-rate schedules by name."""

from collections.abc import Callable, Sequence
from typing import Any

import optax
from optax.contrib import schedule_free

from jaxft.config import AdamWConfig, OptimConfig
from jaxft.errors import ConfigError
from jaxft.optim.adafactor import scale_by_factors
from jaxft.optim.apollo import is_projected, scale_by_apollo
from jaxft.optim.eight_bit import scale_by_adam_8bit
from jaxft.optim.muon import scale_by_orthogonal_momentum
from jaxft.optim.parameters import by_path, is_hidden, kind_of
from jaxft.optim.rates import scale_by_parameter
from jaxft.optim.stochastic_rounding import moments_in_bfloat16
from jaxft.trees import flatten


def make_schedule(config: OptimConfig, total_steps: int) -> Callable[[Any], Any]:
    """Learning rate of a step counted from 0. Warm-up rises linearly and reaches the peak at its last step.

    Raises ConfigError where warm-up leaves no step for the rest.
    """
    warmup = config.warmup_steps or 0
    if config.warmup_ratio is not None:
        warmup = round(config.warmup_ratio * total_steps)
    if warmup and warmup >= total_steps:
        raise ConfigError(
            f"warm-up of {warmup} steps leaves nothing of a run of {total_steps}; lower optim.warmup_steps"
        )
    peak, rest = config.learning_rate, max(1, total_steps - warmup)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, peak * config.min_ratio, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=config.min_ratio),
    }[config.schedule]()
    if not warmup:
        return after
    # Step 0 already moves: (step + 1) / warmup of the peak.
    rise = optax.linear_schedule(peak / warmup, peak * (warmup + 1) / warmup, warmup)
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(
    config: OptimConfig, schedule: Callable[[Any], Any], *, seed: int = 0, stacks: Sequence[Sequence[int]] = ()
) -> optax.GradientTransformation:
    """The optimizer of a config, behind clipping by global norm.

    seed: for what is drawn: rounding of moments, projections. stacks: the numbers of the layers in each stack, read
    for optim.layer_decay. docs/optimizers.md has the sources.
    """
    decay = optax.add_decayed_weights(config.weight_decay, decay_mask)
    after = [decay, *_own_rates(config, stacks), optax.scale_by_learning_rate(schedule)]
    match config.name:
        case "adamw":
            adam = config.adamw
            tx = optax.chain(optax.scale_by_adam(adam.b1, adam.b2, adam.eps), *after)
        case "adamw_8bit":
            adam = config.adamw_8bit
            tx = optax.chain(by_path(scale_by_adam_8bit(b1=adam.b1, b2=adam.b2, eps=adam.eps)), *after)
        case "adafactor":
            scale_parameter = config.adafactor.scale_parameter
            tx = optax.chain(by_path(scale_by_factors(scale_parameter=scale_parameter)), *after)
        case "lion":
            tx = optax.chain(optax.scale_by_lion(config.lion.b1, config.lion.b2), *after)
        case "sgd":
            # As torch has it: decay is part of the gradient, so that momentum carries it on.
            tx = optax.chain(decay, optax.trace(config.sgd.momentum), *after[1:])
        case "muon":
            muon = scale_by_orthogonal_momentum(config.muon.momentum)
            tx = optax.chain(_where(lambda path, x: is_hidden(path, x.ndim), muon, config.muon), *after)
        case "apollo":
            own = config.apollo
            apollo = scale_by_apollo(rank=own.rank, b1=own.b1, b2=own.b2, eps=own.eps, seed=seed)
            takes = lambda path, x: is_hidden(path, x.ndim) and is_projected(x, own.rank)  # noqa: E731
            tx = optax.chain(_where(takes, apollo, own), *after)
        case "schedule_free_adamw":
            free = config.schedule_free_adamw
            second = optax.scale_by_rms(free.b2, free.eps, eps_in_sqrt=False, bias_correction=True)
            # Its own counter starts at 1.
            tx = schedule_free(optax.chain(second, *after), lambda count: schedule(count - 1), free.b1)
        case _:
            raise ConfigError(f"optim.name={config.name!r} is not known")
    if config.moments_dtype == "bfloat16":
        tx = moments_in_bfloat16(tx, seed)
    return tx if config.clip_norm is None else optax.chain(clip(config.clip_norm), tx)


def _where(
    takes: Callable[[str, Any], bool], tx: optax.GradientTransformation, settings: AdamWConfig
) -> optax.GradientTransformation:
    """`tx` for the parameters that it takes, Adam for the others."""
    adam = optax.scale_by_adam(settings.b1, settings.b2, settings.eps)

    def partitioned(tree: dict[str, Any]) -> list[dict[str, Any]]:
        return [{path: x for path, x in tree.items() if takes(path, x) == wanted} for wanted in (True, False)]

    def init(params: dict[str, Any]) -> dict[str, Any]:
        own, others = partitioned(params)
        return {"own": tx.init(own), "adam": adam.init(others)}

    def update(grads: dict[str, Any], state: dict[str, Any], params: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        own, others = partitioned(grads)
        own, own_state = tx.update(own, state["own"])
        others, adam_state = adam.update(others, state["adam"])
        return own | others, {"own": own_state, "adam": adam_state}

    return by_path(optax.GradientTransformation(init, update))


def _own_rates(config: OptimConfig, stacks: Sequence[Sequence[int]]) -> list[optax.GradientTransformation]:
    if config.loraplus_lr_ratio is None and config.layer_decay is None:
        return []
    ratio, layer_decay = config.loraplus_lr_ratio, config.layer_decay
    return [scale_by_parameter(loraplus_lr_ratio=ratio, layer_decay=layer_decay, stacks=stacks)]


def clip(max_norm: float) -> optax.GradientTransformation:
    """Scales gradients down to a global norm of at most max_norm, as torch's clip_grad_norm_ does."""
    return optax.clip_by_global_norm(max_norm)


def decay_mask(params: Any) -> Any:
    """True for matrices, False for norms, biases and other vectors, whose stacked form has two axes as well."""
    flat, treedef = flatten(params)
    return treedef.unflatten([kind_of(path, x.ndim).matrix for path, x in flat.items()])
