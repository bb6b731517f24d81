"""LoRA beside one layer: low-rank adaptation (arXiv:2106.09685), with rank-stabilised scaling (arXiv:2312.03732)."""

# L stacked layers, I inputs, O outputs, r rank

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxft.adapters.attach import AdapterParam, StartParam
from jaxft.adapters.lora_start import draw, moves_the_start
from jaxft.nn import partition
from jaxft.nn.adapter import Adapter
from jaxft.nn.partition import Dimensions
from jaxft.nn.storage import StorageDims

# Whether the tensor axis splits the wide side of A or B in use -> how they are stored and how they are multiplied with.
# Stored, each is split by all axes: beside a quantised base, float32 halves and moments are no small part.
HALF_DIMS: dict[bool, Dimensions] = {True: (None, "both"), False: (None, "spread")}
WHOLE: dict[bool, Dimensions] = {True: (None, "tensor"), False: (None, None)}
HALVES = ("lora_a", "lora_b", "lora_a_start", "lora_b_start")


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """r: rank. alpha: numerator of the scale. dropout: share of inputs dropped, 0 <= dropout < 1.

    use_dora: see `DoRA`. init: how A and B begin; see `lora_start.draw`.
    """

    r: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init: str = "default"

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) when rank-stabilised."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def low_rank(x: jax.Array, a: jax.Array, b: jax.Array, tp_side: str = "outputs") -> jax.Array:
    """x A^T B. x: [..., I], a: [r, I], b: [r, O] -> [..., O]. parted: the wide side that the tensor axis splits.

    Its gradient is the usual one, written so that only operands with the small axis r are transposed:
    JAX's own rule turns the whole output gradient, which costs a CPU a tenth of the step. What has the small axis is
    whole on every device, so that nothing wide has to be gathered.
    """
    return _narrow(jnp.einsum("...i,ri->...r", x, a)) @ b


def _low_rank_forward(
    x: jax.Array, a: jax.Array, b: jax.Array, tp_side: str
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    low = checkpoint_name(_narrow(jnp.einsum("...i,ri->...r", x, a)), "dots")
    return low @ b, (x, low, a, b)


def _low_rank_backward(tp_side: str, residuals: tuple[jax.Array, ...], grad: jax.Array) -> tuple[jax.Array, ...]:
    x, low, a, b = residuals
    grad_low = _narrow(jnp.einsum("...o,ro->...r", grad, b))
    grad_a = partition.split(jnp.einsum("...r,...i->ri", grad_low, x), *WHOLE[tp_side == "inputs"])
    grad_b = partition.split(jnp.einsum("...r,...o->ro", low, grad), *WHOLE[tp_side == "outputs"])
    # The small gradients are made before whatever waits for the large one: else x and grad are kept to the layer's end.
    return jax.lax.optimization_barrier((grad_low @ a, grad_a, grad_b))


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


def _narrow(low: jax.Array) -> jax.Array:
    return partition.split(low, "batch", "sequence", None) if low.ndim == 3 else low


class LoRA(Adapter):
    """`y + scale * drop(x) A^T B`, begun so that a fresh adapter changes nothing.

    lora_a: [*stack, r, I], lora_b: [*stack, r, O], float32 whatever the base is stored in. places: where the layers of
    a stack differ, the settings of each, None for one that is left out; `settings` then has the largest rank, and
    what a layer does not use is zero and stays so, because each half is the other's gradient. kernel: the base's, for
    starts that are read off it. parted: the side of the base layer that the tensor axis splits.

    PiSSA and OLoRA take from the base what they begin with. Here the base stays as it is, and what they begin with is
    kept (lora_a_start, lora_b_start) and subtracted: `scale * x (A^T B - A_start^T B_start)`. That is the same
    function with the same gradients; but a fresh adapter is exact in bfloat16 too, the base on disk is the one that
    the adapter belongs to, and PEFT can load it there as a LoRA of twice the rank (`plain`).
    """

    peft_type = "LORA"

    def __init__(
        self,
        inputs: int,
        outputs: int,
        settings: LoRASettings,
        *,
        stack: tuple[int, ...] = (),
        places: Sequence[LoRASettings | None] | None = None,
        kernel: jax.Array | None = None,
        tp_side: Literal["inputs", "outputs"] = "outputs",
        key: jax.Array,
    ) -> None:
        super().__init__()
        self.settings, self.tp_side = settings, tp_side
        self.places = None if places is None else tuple(places)
        scales = [0.0 if p is None else p.scale for p in self.places or ()]
        self.scales = nnx.Param(jnp.array(scales, jnp.float32)) if scales else None
        a, b = draw(settings.init, settings.r, self._scale(), (*stack, inputs, outputs), kernel, key)
        a, b = self._used(a), self._used(b)
        self.lora_a, self.lora_b = AdapterParam(a), AdapterParam(b)
        moved = moves_the_start(settings.init)
        self.lora_a_start = StartParam(jnp.copy(a)) if moved else None
        self.lora_b_start = StartParam(jnp.copy(b)) if moved else None

    def __call__(self, x: jax.Array, y: jax.Array, kernel: jax.Array, key: jax.Array | None) -> jax.Array:
        """x: [..., I]; y: [..., O], what the base layer gave; key: turns dropout on."""
        return y + self._low_rank(dropped(x, self.settings.dropout, key))

    def storage_dims(self) -> dict[str, StorageDims]:
        halves = {name: half_storage(_side(name) == self.tp_side) for name in HALVES}
        return halves | {"scales": StorageDims(())}

    def merged(self, kernel: jax.Array, at: tuple[int, ...] = ()) -> jax.Array:
        """The kernel that does alone what both do together, float32. at: the place in the stack that `kernel` is of."""
        return kernel + self.delta(at)

    def delta(self, at: tuple[int, ...] = ()) -> jax.Array:
        """What is added to the kernel, float32: [*stack, I, O], or [I, O] at one place of the stack."""
        a, b = (half[at] for half in self._halves())
        return self._scale(at, dimensions=a.ndim) * jnp.einsum("...ri,...ro->...io", a, b, precision="highest")

    def rank(self, place: int | None) -> int:
        """The rank at a place of the stack; 0 where that layer is left out."""
        if self.places is None or place is None:
            return self.settings.r
        return 0 if self.places[place] is None else self.places[place].r

    def plain(self) -> "LoRA":
        """The same without a start of its own, of twice the rank where it has one."""
        if self.lora_a_start is None:
            return self
        a, b = self._halves()
        copy = nnx.merge(*nnx.split(self))
        copy.lora_a, copy.lora_b = AdapterParam(a), AdapterParam(b)
        copy.lora_a_start = copy.lora_b_start = None
        copy.settings = _doubled(self.settings, self.settings.r)
        if self.places is not None:
            copy.places = tuple(p and _doubled(p, self.settings.r) for p in self.places)
        return copy

    def begin_with(self, a: jax.Array) -> None:
        """Sets A, [*stack, r, I], laid out as it is; what a layer does not use of it becomes zero."""
        self.lora_a.set_value(jax.device_put(self._used(a), self.lora_a.get_value().sharding))

    def _used(self, half: jax.Array) -> jax.Array:
        if self.places is None:
            return half
        ranks = jnp.array([0 if p is None else p.r for p in self.places])
        used = jnp.arange(self.settings.r) < ranks[:, None]
        return jnp.where(used.reshape(len(self.places), *(1,) * (half.ndim - 3), self.settings.r, 1), half, 0)

    def _scale(self, at: tuple[int, ...] = (), *, dimensions: int = 0) -> jax.Array | float:
        """A number, or [L, 1, ...] of so many dimensions."""
        if self.scales is None:
            return self.settings.scale
        scales = self.scales.get_value()[at[:1]]
        return scales.reshape(scales.shape + (1,) * (dimensions - scales.ndim)) if dimensions else scales

    def _halves(self) -> tuple[jax.Array, jax.Array]:
        """A and B, the start they are counted from behind them along r."""
        a, b = self.lora_a.get_value(), self.lora_b.get_value()
        if self.lora_a_start is None:
            return a, b
        both = jnp.concatenate([a, self.lora_a_start.get_value()], -2)
        return both, jnp.concatenate([b, -self.lora_b_start.get_value()], -2)

    def _low_rank(self, x: jax.Array) -> jax.Array:
        a, b = (
            partition.gathered(half.astype(x.dtype), HALF_DIMS[side == self.tp_side], WHOLE[side == self.tp_side])
            for half, side in zip(self._halves(), ("inputs", "outputs"), strict=True)
        )
        scale = self._scale()
        return (scale if self.scales is None else scale.astype(x.dtype)) * low_rank(x, a, b, self.tp_side)


def dropped(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """x with a share of its numbers dropped and the rest scaled up; x itself without a key."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def half_storage(split: bool) -> StorageDims:
    """Of A or B, [r, wide side], at rest. split: whether the tensor axis splits the wide side in use.

    If all axes together do not divide the wide side, those of weights alone split it; r stays whole.
    """
    return StorageDims(HALF_DIMS[split], fallback=(None, "weight"))


def _side(name: str) -> str:
    return "inputs" if name.startswith("lora_a") else "outputs"


def _doubled(settings: LoRASettings, r: int) -> LoRASettings:
    # All of both halves, unused rows included, and the scale as it was.
    alpha = settings.scale * (math.sqrt(2 * r) if settings.use_rslora else 2 * r)
    return dataclasses.replace(settings, r=2 * r, alpha=alpha, init="default")
