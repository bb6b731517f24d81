"""Learning rates that differ between parameters: LoRA+ and decay from layer to layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft.optim.parameters import by_path, kind_of

EMBEDDINGS = ("embed_tokens/", "prompt/")


def scale_by_parameter(
    *, loraplus_lr_ratio: float | None, layer_decay: float | None, stacks: Sequence[Sequence[int]]
) -> optax.GradientTransformation:
    """Multiplies updates, decay of weights included, by each parameter's own factor.

    loraplus_lr_ratio: of LoRA's B, and of vectors, as PEFT has it (LoRA+, arXiv:2402.12354).
    layer_decay: of each layer against the one above it. What is above the layers has the factor 1, the last layer
    layer_decay, embeddings the least (ELECTRA, arXiv:2003.10555, appendix A; BEiT, arXiv:2106.08254).
    stacks: for each group of stacked layers, their numbers.
    """

    def factor(path: str, x: jax.Array) -> Any:
        out: Any = 1.0
        if loraplus_lr_ratio is not None and (path.endswith("lora_b") or _is_vector(path, x)):
            out = loraplus_lr_ratio
        return out if layer_decay is None else out * _depth_factor(path, x.ndim, layer_decay, stacks)

    def update(grads: Mapping[str, jax.Array], state: Any, params: Any = None) -> tuple[dict[str, jax.Array], Any]:
        return {path: x * jnp.asarray(factor(path, x), x.dtype) for path, x in grads.items()}, state

    return by_path(optax.GradientTransformation(lambda params: optax.EmptyState(), update))


def _is_vector(path: str, x: jax.Array) -> bool:
    return x.ndim - kind_of(path, x.ndim).stacked == 1


def _depth_factor(path: str, dimensions: int, decay: float, stacks: Sequence[Sequence[int]]) -> Any:
    """decay to the power of how far below the head a parameter is; along the stack for stacked layers."""
    above = sum(len(stack) for stack in stacks) + 1
    if path.startswith(EMBEDDINGS):
        return decay**above
    if not kind_of(path, dimensions).stacked:
        return 1.0
    layers = np.array(stacks[int(path.split("/")[1])])
    return (decay ** (above - 1.0 - layers)).reshape(-1, *(1,) * (dimensions - 1))
