"""Builds the optimizer and the learning-rate schedule of a config."""

from collections.abc import Callable, Sequence

import jax
import optax
from optax.contrib import schedule_free

from jaxft.config import AdamWConfig, OptimConfig
from jaxft.errors import ConfigError
from jaxft.nn.param_kind import kind_of
from jaxft.optim.adafactor import scale_by_factors
from jaxft.optim.apollo import is_projected, scale_by_apollo
from jaxft.optim.by_path import by_path
from jaxft.optim.eight_bit import scale_by_adam_8bit
from jaxft.optim.muon import scale_by_orthogonal_momentum
from jaxft.optim.rates import scale_by_parameter
from jaxft.optim.stochastic_rounding import moments_in_bfloat16
from jaxft.trees import flatten


def make_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by step, counted from 0. Warm-up rises linearly and reaches the peak at its last step.

    Raises ConfigError if warm-up leaves no step for the rest of the schedule.
    """
    warmup = config.warmup_steps or 0
    if config.warmup_ratio is not None:
        warmup = round(config.warmup_ratio * total_steps)
    if warmup and warmup >= total_steps:
        raise ConfigError(
            f"warm-up of {warmup} steps leaves nothing of a run of {total_steps} steps. Lower "
            f"optim.{'warmup_steps' if config.warmup_ratio is None else 'warmup_ratio'}."
        )
    peak, rest = config.learning_rate, max(1, total_steps - warmup)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, peak * config.min_ratio, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=config.min_ratio),
    }[config.schedule]()
    if not warmup:
        return after
    # Step 0 has 1 / warmup of the peak, not 0.
    rise = optax.linear_schedule(peak / warmup, peak * (warmup + 1) / warmup, warmup)
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(
    config: OptimConfig, schedule: optax.Schedule, *, seed: int = 0, stacks: Sequence[Sequence[int]] = ()
) -> optax.GradientTransformation:
    """The optimizer of a config, after clipping by global norm.

    seed: of rounding and projections. stacks: the numbers of the layers in each stack, for optim.layer_decay.
    docs/optimizers.md has the sources.
    """
    decay = optax.add_decayed_weights(config.weight_decay, decay_mask)
    after = [decay, *_own_rates(config, stacks), optax.scale_by_learning_rate(schedule)]
    match config.name:
        case "adamw":
            adam = config.adamw
            tx = optax.chain(optax.scale_by_adam(adam.b1, adam.b2, adam.eps), *after)
        case "adamw_8bit":
            eight_bit = config.adamw_8bit
            scale = scale_by_adam_8bit(b1=eight_bit.b1, b2=eight_bit.b2, eps=eight_bit.eps)
            tx = optax.chain(by_path(scale), *after)
        case "adafactor":
            scale_parameter = config.adafactor.scale_parameter
            tx = optax.chain(by_path(scale_by_factors(scale_parameter=scale_parameter)), *after)
        case "lion":
            tx = optax.chain(optax.scale_by_lion(config.lion.b1, config.lion.b2), *after)
        case "sgd":
            # As in torch, weight decay is part of the gradient, and so of the momentum.
            tx = optax.chain(decay, optax.trace(config.sgd.momentum), *after[1:])
        case "muon":
            muon = scale_by_orthogonal_momentum(config.muon.momentum)
            tx = optax.chain(_with_adam(muon, lambda path, x: kind_of(path, x.ndim).hidden_matrix, config.muon), *after)
        case "apollo":
            own = config.apollo
            apollo = scale_by_apollo(rank=own.rank, b1=own.b1, b2=own.b2, eps=own.eps, seed=seed)
            selects = lambda path, x: kind_of(path, x.ndim).hidden_matrix and is_projected(x, own.rank)  # noqa: E731
            tx = optax.chain(_with_adam(apollo, selects, own), *after)
        case "schedule_free_adamw":
            free = config.schedule_free_adamw
            second = optax.scale_by_rms(free.b2, free.eps, eps_in_sqrt=False, bias_correction=True)
            # schedule_free counts steps from 1.
            tx = schedule_free(optax.chain(second, *after), lambda count: schedule(count - 1), free.b1)
        case _:
            raise ConfigError(f"optim.name={config.name!r} is not known")
    if config.moments_dtype == "bfloat16":
        tx = moments_in_bfloat16(tx, seed)
    return tx if config.clip_norm is None else optax.chain(clip(config.clip_norm), tx)


def _with_adam(
    tx: optax.GradientTransformation, selects: Callable[[str, jax.Array], bool], settings: AdamWConfig
) -> optax.GradientTransformation:
    """`tx`, which works on dicts from path to array, for the parameters that `selects` selects; Adam for the others."""

    def labels(params: dict[str, jax.Array]) -> dict[str, str]:
        return {path: "own" if selects(path, x) else "adam" for path, x in params.items()}

    # The inner by_path drops the placeholders that optax.partition has for the other parameters.
    adam = optax.scale_by_adam(settings.b1, settings.b2, settings.eps)
    return by_path(optax.partition({"own": by_path(tx), "adam": adam}, labels))


def _own_rates(config: OptimConfig, stacks: Sequence[Sequence[int]]) -> list[optax.GradientTransformation]:
    if config.loraplus_lr_ratio is None and config.layer_decay is None:
        return []
    ratio, layer_decay = config.loraplus_lr_ratio, config.layer_decay
    return [scale_by_parameter(loraplus_lr_ratio=ratio, layer_decay=layer_decay, stacks=stacks)]


def clip(max_norm: float) -> optax.GradientTransformation:
    """Scales gradients down to a global norm of at most max_norm, as torch's clip_grad_norm_."""
    return optax.clip_by_global_norm(max_norm)


def decay_mask(params: optax.Params) -> optax.Params:
    """True for matrices, False for norms, biases and other vectors, even if stacking gives them two axes."""
    flat, treedef = flatten(params)
    return jax.tree.unflatten(treedef, [kind_of(path, x.ndim).matrix for path, x in flat.items()])
