"""Learning rates that differ between parameters: LoRA+ and layer-wise decay."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft.nn.param_kind import CRITIC, kind_of
from jaxft.optim.by_path import by_path

EMBEDDINGS = ("embed_tokens/", "per_layer/", "prompt/")
Factor = float | np.ndarray


def scale_by_parameter(
    *, loraplus_lr_ratio: float | None, layer_decay: float | None, stacks: Sequence[Sequence[int]]
) -> optax.GradientTransformation:
    """Multiplies updates, weight decay included, by a factor for each parameter.

    loraplus_lr_ratio: factor of LoRA's B and of vectors, as in PEFT (LoRA+, arXiv:2402.12354); None for 1.
    layer_decay: ratio of each layer's factor to that of the layer above. Norm and head above the layers have the factor
    1, the last layer layer_decay, embeddings the smallest (ELECTRA, arXiv:2003.10555, appendix A; BEiT,
    arXiv:2106.08254). None for 1.
    stacks: for each group of stacked layers, their numbers.
    """

    def factor(path: str, x: jax.Array) -> Factor:
        # A critic's adapters are at the depth of the layers that they are for.
        path = path.removeprefix(CRITIC)
        out: Factor = 1.0
        if loraplus_lr_ratio is not None and (path.endswith("lora_b") or _is_vector(path, x)):
            out = loraplus_lr_ratio
        return out if layer_decay is None else out * _depth_factor(path, x.ndim, layer_decay, stacks)

    def update(
        grads: Mapping[str, jax.Array], state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[dict[str, jax.Array], optax.EmptyState]:
        return {path: x * jnp.asarray(factor(path, x), x.dtype) for path, x in grads.items()}, state

    return by_path(optax.GradientTransformation(lambda params: optax.EmptyState(), update))


def _is_vector(path: str, x: jax.Array) -> bool:
    return x.ndim - kind_of(path, x.ndim).stacked == 1


def _depth_factor(path: str, dimensions: int, decay: float, stacks: Sequence[Sequence[int]]) -> Factor:
    """decay to the power of a parameter's distance from the head; an array along the stack for stacked layers."""
    above = sum(len(stack) for stack in stacks) + 1
    if path.startswith(EMBEDDINGS):
        return decay**above
    if not kind_of(path, dimensions).stacked:
        return 1.0
    layers = np.array(stacks[int(path.split("/")[1])])
    return (decay ** (above - 1.0 - layers)).reshape(-1, *(1,) * (dimensions - 1))
