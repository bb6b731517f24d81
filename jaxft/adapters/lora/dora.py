"""DoRA: the directions of a kernel's columns and their lengths are trained separately (arXiv:2402.09353)."""

# L stacked layers, I inputs, O outputs, r rank

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxft.adapters.attach import AdapterParam
from jaxft.adapters.dropout import dropout
from jaxft.adapters.lora.low_rank import LoRA, LoRASettings
from jaxft.nn import partition
from jaxft.nn.linear import BIAS_DIMS, WHOLE, TPSide, product
from jaxft.nn.storage import StorageDims
from jaxft.quant import QuantizedArray, dense


class DoRA(LoRA):
    """`m V / |V|` in place of the kernel W, with V = W + scale A^T B and the lengths |V| of its columns, [O].

    lora_magnitude: m, [*stack, O], initially |V|, so that a fresh adapter changes nothing. |V| has no gradient (section
    4.3). With dropout, the part that m / |V| adds uses the product of the base with the dropped inputs, as in PEFT.
    """

    # m scales the product with the kernel, not the bias.
    on_product = True
    stacks = False

    def __init__(
        self,
        inputs: int,
        outputs: int,
        settings: LoRASettings,
        *,
        stack: tuple[int, ...] = (),
        stack_settings: Sequence[LoRASettings | None] | None = None,
        kernel: jax.Array | QuantizedArray,
        tp_side: TPSide = "outputs",
        key: jax.Array,
    ) -> None:
        super().__init__(
            inputs, outputs, settings,
            stack=stack, stack_settings=stack_settings, kernel=kernel, tp_side=tp_side, key=key,
        )  # fmt: skip
        # A fresh A^T B is zero. Jitted: no float32 copy of a whole stack.
        self.lora_magnitude = AdapterParam(jax.jit(_lengths)(kernel))

    def __call__(self, x: jax.Array, y: jax.Array, kernel: jax.Array, key: jax.Array | None) -> jax.Array:
        magnitude = self.lora_magnitude.get_value()
        gain = magnitude / jax.lax.stop_gradient(self._merged_lengths(dense(kernel, jnp.float32)))
        if self.scales is not None:
            gain = jnp.where(self.scales.get_value() == 0, 1, gain)
        gain = partition.gather(gain, BIAS_DIMS[self.tp_side], WHOLE[self.tp_side][1:])
        x_dropped = dropout(x, self.settings.dropout, key)
        y_dropped = y if x_dropped is x else product(x_dropped, kernel, self.tp_side)
        # float32: bfloat16 has no number between 1 and 1.0078.
        added = (gain - 1) * y_dropped.astype(jnp.float32) + gain * self._low_rank(x_dropped).astype(jnp.float32)
        return (y.astype(jnp.float32) + added).astype(y.dtype)

    def storage_dims(self) -> dict[str, StorageDims]:
        return super().storage_dims() | {"lora_magnitude": StorageDims(BIAS_DIMS[self.tp_side])}

    def merged(self, kernel: jax.Array, at: tuple[int, ...] = ()) -> jax.Array:
        directions = kernel + self.delta(at)
        gain = self.lora_magnitude.get_value()[at] / jnp.linalg.norm(directions, axis=-2)
        if self.scales is not None:
            gain = jnp.where(self._scale(at, dimensions=gain.ndim) == 0, 1, gain)
        return directions * gain[..., None, :]

    def _merged_lengths(self, kernel: jax.Array) -> jax.Array:
        """|V|, [..., O], for a float32 kernel [..., I, O], computed from the small halves without forming V.

        |W + s D|^2 = |W|^2 + 2 s W.D + s^2 |D|^2, column by column, with D = A^T B.
        """
        a, b = self._halves()
        scale = self._scale(dimensions=kernel.ndim - 1)
        einsum = functools.partial(jnp.einsum, precision="highest")
        crossed = (einsum("...ri,...io->...ro", a, kernel) * b).sum(-2)
        inner = einsum("...rq,...ro->...qo", einsum("...ri,...qi->...rq", a, a), b)
        squared = (kernel * kernel).sum(-2) + 2 * scale * crossed + scale**2 * (inner * b).sum(-2)
        return jnp.sqrt(jnp.maximum(squared, jnp.finfo(jnp.float32).tiny))


def _lengths(kernel: jax.Array) -> jax.Array:
    kernel = dense(kernel, jnp.float32)
    return jnp.sqrt((kernel * kernel).sum(-2))
