"""LoRA: low-rank adaptation (arXiv:2106.09685), with rank-stabilised scaling (arXiv:2312.03732) by choice."""

# L stacked layers, I inputs, O outputs, r rank

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxft.nn import partition
from jaxft.nn.linear import Linear

# Whether the tensor axis splits the wide side of A or B -> how they are stored and how they are multiplied with.
STORED = {True: (None, "both"), False: (None, "weight")}
WHOLE = {True: (None, "tensor"), False: (None, None)}


class AdapterParam(nnx.Param):
    """A parameter of an adapter: what moves while the base stands still."""


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """r: rank. alpha: numerator of the scale. dropout: share of inputs dropped, 0 <= dropout < 1."""

    r: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) when rank-stabilised."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def low_rank(x: jax.Array, a: jax.Array, b: jax.Array, parted: str = "outputs") -> jax.Array:
    """x A^T B. x: [..., I], a: [r, I], b: [r, O] -> [..., O]. parted: the wide side that the tensor axis splits.

    Its gradient is the usual one, written so that only operands with the small axis r are transposed:
    JAX's own rule turns the whole output gradient, which costs a CPU a tenth of the step. What has the small axis is
    whole on every device, so that nothing wide has to be gathered.
    """
    return _narrow(jnp.einsum("...i,ri->...r", x, a)) @ b


def _low_rank_forward(x: jax.Array, a: jax.Array, b: jax.Array, parted: str) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    low = checkpoint_name(_narrow(jnp.einsum("...i,ri->...r", x, a)), "dots")
    return low @ b, (x, low, a, b)


def _low_rank_backward(parted: str, residuals: tuple[jax.Array, ...], grad: jax.Array) -> tuple[jax.Array, ...]:
    x, low, a, b = residuals
    grad_low = _narrow(jnp.einsum("...o,ro->...r", grad, b))
    grad_a = partition.split(jnp.einsum("...r,...i->ri", grad_low, x), *WHOLE[parted == "inputs"])
    grad_b = partition.split(jnp.einsum("...r,...o->ro", low, grad), *WHOLE[parted == "outputs"])
    return grad_low @ a, grad_a, grad_b


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


def _narrow(low: jax.Array) -> jax.Array:
    return partition.split(low, "batch", "sequence", None) if low.ndim == 3 else low


class LoRA(nnx.Module):
    """`y + scale * drop(x) A^T B`, A drawn and B zero, so that a fresh adapter changes nothing.

    lora_a: [*stack, r, I], lora_b: [*stack, r, O], float32 whatever the base is stored in. parted: the side of the
    base layer that the tensor axis splits.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        settings: LoRASettings,
        *,
        stack: tuple[int, ...] = (),
        parted: Literal["inputs", "outputs"] = "outputs",
        key: jax.Array,
    ) -> None:
        # Kaiming uniform with a = sqrt(5), as PEFT draws it: variance 1 / (3 I).
        bound = 1.0 / math.sqrt(inputs)
        shape = (*stack, settings.r, inputs)
        self.lora_a = AdapterParam(jax.random.uniform(key, shape, jnp.float32, -bound, bound))
        self.lora_b = AdapterParam(jnp.zeros((*stack, settings.r, outputs), jnp.float32))
        self.settings = settings
        self.parted = parted

    def __call__(self, x: jax.Array, y: jax.Array, kernel: jax.Array, key: jax.Array | None) -> jax.Array:
        """x: [..., I]; y: [..., O], what the base layer gave; key: turns dropout on."""
        if key is not None and self.settings.dropout > 0:
            keep = jax.random.bernoulli(key, 1 - self.settings.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.settings.dropout), 0).astype(x.dtype)
        a, b = (
            partition.gathered(
                kept.get_value().astype(x.dtype), STORED[side == self.parted], WHOLE[side == self.parted]
            )
            for kept, side in ((self.lora_a, "inputs"), (self.lora_b, "outputs"))
        )
        return y + self.settings.scale * low_rank(x, a, b, self.parted)

    def stored(self) -> dict[str, tuple[partition.Dimension | None, ...]]:
        """What the dimensions of both halves are, stack axes left out."""
        return {"lora_a": STORED[self.parted == "inputs"], "lora_b": STORED[self.parted == "outputs"]}

    def delta(self, layer: int | None = None) -> jax.Array:
        """What merging adds to the kernel, float32: [*stack, I, O], or one layer's [I, O] of a stack."""
        a, b = self.lora_a.get_value(), self.lora_b.get_value()
        if layer is not None:
            a, b = a[layer], b[layer]
        return self.settings.scale * jnp.einsum("...ri,...ro->...io", a, b, precision="highest")


def beside(settings: LoRASettings) -> Callable[[Linear, jax.Array], LoRA]:
    """What `attach` makes a LoRA with: `(layer, key) -> LoRA` of the layer's sizes."""

    def make(layer: Linear, key: jax.Array) -> LoRA:
        *stack, inputs, outputs = layer.kernel.get_value().shape
        return LoRA(inputs, outputs, settings, stack=tuple(stack), parted=layer.parted, key=key)

    return make
