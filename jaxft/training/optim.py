"""Optimizers and learning-rate schedules by name, from optax."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxft.config import OptimConfig
from jaxft.errors import ConfigError
from jaxft.training.rounding import moments_in_bfloat16

# Parameters that weight decay leaves alone, by the last part of their path.
UNDECAYED = ("scale", "bias")


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
    config: OptimConfig, schedule: Callable[[Any], Any], *, seed: int = 0
) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101) behind clipping by global norm. seed: for moments that are rounded at random."""
    adamw = optax.adamw(
        schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=decay_mask
    )
    if config.moments_dtype == "bfloat16":
        adamw = moments_in_bfloat16(adamw, seed)
    return adamw if config.clip_norm is None else optax.chain(clip(config.clip_norm), adamw)


def clip(max_norm: float) -> optax.GradientTransformation:
    """Scales gradients down to a global norm of at most max_norm, as torch's clip_grad_norm_ does."""
    return optax.clip_by_global_norm(max_norm)


def decay_mask(params: Any) -> Any:
    """True for matrices, False for norms and biases, whose stacked form has two axes as well."""

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        names = [str(getattr(entry, "key", "")) for entry in path]
        return not any(name in UNDECAYED for name in names)

    return jax.tree_util.tree_map_with_path(decays, params)
