"""LoRA: low-rank adaptation (arXiv:2106.09685), with rank-stabilised scaling (arXiv:2312.03732) by choice."""

# L stacked layers, I inputs, O outputs, r rank

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name


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


@jax.custom_vjp
def low_rank(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """x A^T B. x: [..., I], a: [r, I], b: [r, O] -> [..., O].

    Its gradient is the usual one, written so that only operands with the small axis r are transposed:
    JAX's own rule turns the whole output gradient, which costs a CPU a tenth of the step.
    """
    return jnp.einsum("...i,ri->...r", x, a) @ b


def _low_rank_forward(x: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    low = checkpoint_name(jnp.einsum("...i,ri->...r", x, a), "dots")
    return low @ b, (x, low, a, b)


def _low_rank_backward(residuals: tuple[jax.Array, ...], grad: jax.Array) -> tuple[jax.Array, ...]:
    x, low, a, b = residuals
    grad_low = jnp.einsum("...o,ro->...r", grad, b)
    return grad_low @ a, jnp.einsum("...r,...i->ri", grad_low, x), jnp.einsum("...r,...o->ro", low, grad)


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


class LoRA(nnx.Module):
    """`y + scale * drop(x) A^T B`, A drawn and B zero, so that a fresh adapter changes nothing.

    lora_a: [*stack, r, I], lora_b: [*stack, r, O], float32 whatever the base is stored in.
    """

    def __init__(
        self, inputs: int, outputs: int, settings: LoRASettings, *, stack: tuple[int, ...] = (), key: jax.Array
    ) -> None:
        # Kaiming uniform with a = sqrt(5), as PEFT draws it: variance 1 / (3 I).
        bound = 1.0 / math.sqrt(inputs)
        shape = (*stack, settings.r, inputs)
        self.lora_a = AdapterParam(jax.random.uniform(key, shape, jnp.float32, -bound, bound))
        self.lora_b = AdapterParam(jnp.zeros((*stack, settings.r, outputs), jnp.float32))
        self.settings = settings

    def __call__(self, x: jax.Array, y: jax.Array, kernel: jax.Array, key: jax.Array | None) -> jax.Array:
        """x: [..., I]; y: [..., O], what the base layer gave; key: turns dropout on."""
        if key is not None and self.settings.dropout > 0:
            keep = jax.random.bernoulli(key, 1 - self.settings.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.settings.dropout), 0).astype(x.dtype)
        a, b = self.lora_a.get_value().astype(x.dtype), self.lora_b.get_value().astype(x.dtype)
        return y + self.settings.scale * low_rank(x, a, b)

    def delta(self, layer: int | None = None) -> jax.Array:
        """What merging adds to the kernel, float32: [*stack, I, O], or one layer's [I, O] of a stack."""
        a, b = self.lora_a.get_value(), self.lora_b.get_value()
        if layer is not None:
            a, b = a[layer], b[layer]
        return self.settings.scale * jnp.einsum("...ri,...ro->...io", a, b, precision="highest")
