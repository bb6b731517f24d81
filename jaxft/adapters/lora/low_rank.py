"""LoRA on one layer: low-rank adaptation (arXiv:2106.09685), with rank-stabilised scaling (arXiv:2312.03732)."""

# L stacked layers, I inputs, O outputs, r rank

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxft.adapters.attach import AdapterParam, StartParam
from jaxft.adapters.dropout import dropout
from jaxft.adapters.lora.start import draw, starts_nonzero
from jaxft.nn import partition
from jaxft.nn.adapter import Adapter, LayerAdapter
from jaxft.nn.linear import BIAS_DIMS, TPSide
from jaxft.nn.linear import WHOLE as LAYER_WHOLE
from jaxft.nn.partition import Dimensions
from jaxft.nn.storage import StorageDims
from jaxft.quant import QuantizedArray

# The dimensions of A and B in storage and in use. The key: whether the tensor axis splits their wide side in use. In
# storage all axes split them, because beside a quantized base float32 halves and their moments are a large share of the
# memory.
HALF_DIMS: dict[bool, Dimensions] = {True: (None, "both"), False: (None, "all_axes")}
WHOLE: dict[bool, Dimensions] = {True: (None, "tensor"), False: (None, None)}
HALVES = ("lora_a", "lora_b", "lora_a_start", "lora_b_start")


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """r: rank. alpha: numerator of the scale. dropout: share of inputs dropped, 0 <= dropout < 1.

    use_dora: see `DoRA`. use_bias: whether B has a bias, which is scaled with it. init: the initial values of A and B;
    see `start.draw`.
    """

    r: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    use_bias: bool = False
    init: str = "default"

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) when rank-stabilised."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def low_rank(
    x: jax.Array, a: jax.Array, bs: tuple[jax.Array, ...], tp_side: TPSide = "outputs"
) -> tuple[jax.Array, ...]:
    """x A_i^T B_i of several layers i with one input. x: [..., I], a: [R, I], the A of one layer after the other; bs:
    [r_i, O_i], whose r add up to R. The results are [..., O_i]. tp_side: the wide side that the tensor axis splits.

    Its gradient is the usual one, but only operands with the small axis r are transposed. JAX's own rule transposes the
    whole output gradient, which takes a tenth of the step on a CPU. Arrays with the small axis are whole on every
    device, so that no wide array has to be gathered.
    """
    return _raised(_narrow(jnp.einsum("...i,ri->...r", x, a)), bs)


def _low_rank_forward(
    x: jax.Array, a: jax.Array, bs: tuple[jax.Array, ...], tp_side: TPSide
) -> tuple[tuple[jax.Array, ...], Any]:
    low = checkpoint_name(_narrow(jnp.einsum("...i,ri->...r", x, a)), "dots")
    return _raised(low, bs), (x, low, a, bs)


def _low_rank_backward(tp_side: TPSide, residuals: Any, grads: tuple[jax.Array, ...]) -> tuple[Any, ...]:
    x, low, a, bs = residuals
    parts = (jnp.einsum("...o,ro->...r", grad, b) for grad, b in zip(grads, bs, strict=True))
    grad_low = _narrow(jnp.concatenate(tuple(parts), -1))
    grad_a = partition.split(jnp.einsum("...r,...i->ri", grad_low, x), *WHOLE[tp_side == "inputs"])
    grad_bs = tuple(
        partition.split(jnp.einsum("...r,...o->ro", own, grad), *WHOLE[tp_side == "outputs"])
        for own, grad in zip(_of_each(low, bs), grads, strict=True)
    )
    # The small gradients are computed before all that depends on the large one. Otherwise x and grad stay until the
    # layer ends.
    return jax.lax.optimization_barrier((grad_low @ a, grad_a, grad_bs))


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


def _raised(low: jax.Array, bs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(own @ b for own, b in zip(_of_each(low, bs), bs, strict=True))


def _of_each(low: jax.Array, bs: tuple[jax.Array, ...]) -> list[jax.Array]:
    """The columns of each layer in low [..., R]."""
    ends = list(itertools.accumulate(b.shape[0] for b in bs))
    return jnp.split(low, ends[:-1], axis=-1)


def _narrow(low: jax.Array) -> jax.Array:
    return partition.split(low, "batch", "sequence", None) if low.ndim == 3 else low


class LowRank(LayerAdapter):
    """The halves A and B of `y + scale * x A^T B`, initialized so that a fresh adapter changes nothing.

    lora_a: [*stack, r, I], lora_b: [*stack, r, O], float32 for every dtype of the base. lora_bias: [*stack, O] or None.
    stack_settings: the settings of each layer if the layers of a stack differ, None for a layer without the adapter.
    `settings` then has the largest rank, and the rows that a layer does not use are zero; they stay zero, because each
    half is a factor of the other's gradient. kernel: the base's, for initial values that depend on it. tp_side: the
    side of the base layer that the tensor axis splits.

    PiSSA and OLoRA subtract the initial product from the base. Here the base does not change. The initial values are
    kept (lora_a_start, lora_b_start) and subtracted in use: `scale * x (A^T B - A_start^T B_start)`. This is the same
    function with the same gradients, and has three advantages: a fresh adapter is exact in bfloat16 too, the adapter
    belongs to the base on disk, and PEFT can load it onto that base as a LoRA of twice the rank (`plain`).
    """

    peft_type = "LORA"

    def __init__(
        self,
        inputs: int,
        outputs: int,
        settings: LoRASettings,
        *,
        stack: tuple[int, ...] = (),
        stack_settings: Sequence[LoRASettings | None] | None = None,
        kernel: jax.Array | QuantizedArray | None = None,
        tp_side: TPSide = "outputs",
        key: jax.Array,
    ) -> None:
        super().__init__()
        self.settings, self.tp_side = settings, tp_side
        self.stack_settings = None if stack_settings is None else tuple(stack_settings)
        scales = [0.0 if p is None else p.scale for p in self.stack_settings or ()]
        self.scales = nnx.Param(jnp.array(scales, jnp.float32)) if scales else None
        a, b = draw(settings.init, settings.r, self._scale(), (*stack, inputs, outputs), kernel, key)
        a, b = self._mask_unused(a), self._mask_unused(b)
        self.lora_a, self.lora_b = AdapterParam(a), AdapterParam(b)
        self.lora_bias = AdapterParam(jnp.zeros((*stack, outputs), jnp.float32)) if settings.use_bias else None
        nonzero = starts_nonzero(settings.init)
        self.lora_a_start = StartParam(jnp.copy(a)) if nonzero else None
        self.lora_b_start = StartParam(jnp.copy(b)) if nonzero else None

    def storage_dims(self) -> dict[str, StorageDims]:
        halves = {name: half_storage(_side(name) == self.tp_side) for name in HALVES}
        return halves | {"scales": StorageDims(()), "lora_bias": StorageDims(BIAS_DIMS[self.tp_side])}

    @property
    def adds_bias(self) -> bool:
        return self.lora_bias is not None

    def merged_bias(self, bias: jax.Array, at: tuple[int, ...] = ()) -> jax.Array:
        if self.lora_bias is None:
            return bias
        added = self.lora_bias.get_value()[at]
        return bias + self._scale(at, dimensions=added.ndim) * added

    def merged(self, kernel: jax.Array, at: tuple[int, ...] = ()) -> jax.Array:
        return kernel + self.delta(at)

    def delta(self, at: tuple[int, ...] = ()) -> jax.Array:
        """The difference of the merged kernel and the kernel, float32: [*stack, I, O], or [I, O] at one stack index."""
        a, b = (half[at] for half in self._halves())
        return self._scale(at, dimensions=a.ndim) * jnp.einsum("...ri,...ro->...io", a, b, precision="highest")

    def scaled_halves(self) -> tuple[jax.Array, jax.Array]:
        """A and scale * B, float32: [*stack, r, I] and [*stack, r, O], or twice r with initial values to subtract."""
        a, b = self._halves()
        return a, self._scale(dimensions=b.ndim) * b

    def rank(self, stack_index: int | None) -> int:
        """The rank at a stack index; 0 if that layer has no adapter."""
        if self.stack_settings is None or stack_index is None:
            return self.settings.r
        settings = self.stack_settings[stack_index]
        return 0 if settings is None else settings.r

    def plain(self) -> Self:
        """The same function as a LoRA without initial values to subtract: this adapter, or one of twice the rank."""
        if self.lora_a_start is None:
            return self
        a, b = self._halves()
        copy = nnx.merge(*nnx.split(self))
        copy.lora_a, copy.lora_b = AdapterParam(a), AdapterParam(b)
        copy.lora_a_start = copy.lora_b_start = None
        copy.settings = _double_rank(self.settings, self.settings.r)
        if self.stack_settings is not None:
            copy.stack_settings = tuple(p and _double_rank(p, self.settings.r) for p in self.stack_settings)
        return copy

    def set_a(self, a: jax.Array) -> None:
        """Sets A, [*stack, r, I], split over devices as before; rows that a layer does not use become zero."""
        self.lora_a.set_value(jax.device_put(self._mask_unused(a), self.lora_a.get_value().sharding))

    def _mask_unused(self, half: jax.Array) -> jax.Array:
        if self.stack_settings is None:
            return half
        ranks = jnp.array([0 if p is None else p.r for p in self.stack_settings])
        used = jnp.arange(self.settings.r) < ranks[:, None]
        return jnp.where(used.reshape(len(self.stack_settings), *(1,) * (half.ndim - 3), self.settings.r, 1), half, 0)

    def _scale(self, at: tuple[int, ...] = (), *, dimensions: int = 0) -> jax.Array | float:
        """A number, or [L, 1, ...] with `dimensions` axes."""
        if self.scales is None:
            return self.settings.scale
        scales = self.scales.get_value()[at[:1]]
        return scales.reshape(scales.shape + (1,) * (dimensions - scales.ndim)) if dimensions else scales

    def _halves(self) -> tuple[jax.Array, jax.Array]:
        """A and B, each followed along r by the initial values that are subtracted."""
        a, b = self.lora_a.get_value(), self.lora_b.get_value()
        if self.lora_a_start is None or self.lora_b_start is None:
            return a, b
        both = jnp.concatenate([a, self.lora_a_start.get_value()], -2)
        return both, jnp.concatenate([b, -self.lora_b_start.get_value()], -2)


class LoRA(LowRank, Adapter):
    """`y + scale * drop(x) A^T B`, for a Linear."""

    def __call__(self, x: jax.Array, y: jax.Array, kernel: jax.Array, key: jax.Array | None) -> jax.Array:
        return y + self._with_bias(self._low_rank(dropout(x, self.settings.dropout, key)))

    @classmethod
    def additions(
        cls, adapters: Sequence[Self], x: jax.Array, keys: Sequence[jax.Array | None]
    ) -> tuple[jax.Array, ...] | None:
        alike = {(adapter.tp_side, adapter.settings.dropout) for adapter in adapters}
        if cls is not LoRA or len(alike) > 1:
            return None
        # One draw for all: each adapter sees the same part of the input.
        added = _low_ranks(adapters, dropout(x, adapters[0].settings.dropout, keys[0]))
        return tuple(one._with_bias(own) for one, own in zip(adapters, added, strict=True))

    def _with_bias(self, added: jax.Array) -> jax.Array:
        """What the adapter adds to its layer, given the part of A and B."""
        if self.lora_bias is None:
            return added
        bias = (self._scale() * self.lora_bias.get_value()).astype(added.dtype)
        return added + partition.gather(bias, BIAS_DIMS[self.tp_side], LAYER_WHOLE[self.tp_side][1:])

    def _low_rank(self, x: jax.Array) -> jax.Array:
        return _low_ranks((self,), x)[0]


def _low_ranks(adapters: Sequence[LoRA], x: jax.Array) -> tuple[jax.Array, ...]:
    """`scale * x A^T B` of adapters whose layers have the same input and the same `tp_side`."""
    side = adapters[0].tp_side
    halves = [adapter._halves() for adapter in adapters]
    # The scale is a factor of B, which is smaller than what comes of it.
    scaled = [adapter._scale() * b for adapter, (_, b) in zip(adapters, halves, strict=True)]
    a, *bs = (
        partition.gather(half.astype(x.dtype), HALF_DIMS[split], WHOLE[split])
        for half, split in [
            (jnp.concatenate([a for a, _ in halves], -2), side == "inputs"),
            *((b, side == "outputs") for b in scaled),
        ]
    )
    return low_rank(x, a, tuple(bs), side)


def half_storage(split: bool) -> StorageDims:
    """The storage of A or B, [r, wide side]. split: whether the tensor axis splits the wide side in use. If all axes
    together do not divide the wide side, only those of weights split it; r stays whole.
    """
    return StorageDims(HALF_DIMS[split], fallback=(None, "weight"))


def _side(name: str) -> TPSide:
    return "inputs" if name.startswith("lora_a") else "outputs"


def _double_rank(settings: LoRASettings, r: int) -> LoRASettings:
    # All of both halves, unused rows included; the scale is unchanged.
    alpha = settings.scale * (math.sqrt(2 * r) if settings.use_rslora else 2 * r)
    return dataclasses.replace(settings, r=2 * r, alpha=alpha, init="default")
