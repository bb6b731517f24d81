"""VeRA: learned factors around one pair of random matrices that all layers share (arXiv:2310.11454, eq. 2)."""

# L stacked layers, I inputs, O outputs, r rank

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxft.adapters.attach import AdapterParam, Layer, attach, find, weight
from jaxft.adapters.dropout import described, dropout
from jaxft.config import AdapterConfig
from jaxft.errors import ModelError
from jaxft.nn import partition
from jaxft.nn.adapter import Adapter
from jaxft.nn.decoder import Decoder
from jaxft.nn.linear import Linear, TPSide
from jaxft.nn.partition import Dimensions
from jaxft.nn.storage import StorageDims

SHARED_DIMS: Dimensions = (None, "weight")
D_DIMS: Dimensions = ("weight",)
B_DIMS: Dimensions = ("both",)
WHOLE: dict[TPSide, Dimensions] = {"outputs": ("tensor",), "inputs": (None,), "neither": (None,)}
D_INITIAL = 0.1  # table 6c of the paper, and PEFT's default


@dataclass(frozen=True, kw_only=True)
class VeRASettings:
    """r: rank. dropout: share of inputs dropped. seed: of the shared matrices, which PEFT calls projection_prng_key."""

    r: int
    dropout: float = 0.0
    seed: int = 0


class Projections(nnx.Module):
    """The shared random matrices, float32 and frozen. a: [r, largest I], b: [r, largest O]."""

    def __init__(self, a_rI: np.ndarray, b_rO: np.ndarray) -> None:
        self.a, self.b = nnx.Param(jnp.asarray(a_rI)), nnx.Param(jnp.asarray(b_rO))

    def arrays(self, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
        """Both, whole on every device. They are gathered once a step, because every layer uses the start of all their
        rows.
        """
        a, b = (partition.gather(p.get_value().astype(dtype), SHARED_DIMS, (None, None)) for p in (self.a, self.b))
        return a, b

    def storage_dims(self) -> dict[str, StorageDims]:
        return {"a": StorageDims(SHARED_DIMS), "b": StorageDims(SHARED_DIMS)}


class VeRA(Adapter):
    """`y + lambda_b * ((lambda_d * (drop(x) A^T)) B^T)`; lambda_b is initially zero, which changes nothing.

    lambda_d: [*stack, r], lambda_b: [*stack, O], float32. A layer uses the first I columns of A and O columns of B.
    """

    peft_type = "VERA"

    def __init__(self, outputs: int, settings: VeRASettings, *, stack: tuple[int, ...] = (), tp_side: TPSide) -> None:
        super().__init__()
        self.lambda_d = AdapterParam(jnp.full((*stack, settings.r), D_INITIAL, jnp.float32))
        self.lambda_b = AdapterParam(jnp.zeros((*stack, outputs), jnp.float32))
        self.settings = settings
        self.tp_side = tp_side

    def __call__(self, x: jax.Array, y: jax.Array, kernel: jax.Array, key: jax.Array | None) -> jax.Array:
        a, b = self.shared
        d = partition.gather(self.lambda_d.get_value().astype(x.dtype), D_DIMS, (None,))
        factors = partition.gather(self.lambda_b.get_value().astype(x.dtype), B_DIMS, WHOLE[self.tp_side])
        x = dropout(x, self.settings.dropout, key)
        low = jnp.einsum("...i,ri->...r", x, a[:, : x.shape[-1]]) * d
        return y + factors * (low @ b[:, : y.shape[-1]])

    def merged(self, kernel: jax.Array, at: tuple[int, ...] = ()) -> jax.Array:
        a, b = self.shared
        d, factors = self.lambda_d.get_value()[at], self.lambda_b.get_value()[at]
        low = d[..., :, None] * a[:, : kernel.shape[-2]]
        wide = factors[..., None, :] * b[:, : kernel.shape[-1]]
        return kernel + jnp.einsum("...ri,...ro->...io", low, wide, precision="highest")

    def storage_dims(self) -> dict[str, StorageDims]:
        return {"lambda_d": StorageDims(D_DIMS), "lambda_b": StorageDims(B_DIMS)}


def draw_projections(r: int, inputs: int, outputs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The shared matrices that PEFT draws from a seed, exact in every bit: Kaiming uniform, first A [r, I], then B [O,
    r]. They follow torch: 24 bits of each draw of a Mersenne twister, scaled with one rounding.
    """
    bits = np.random.MT19937()
    bits._legacy_seeding(seed % 2**32)

    def draw(rows: int, columns: int) -> np.ndarray:
        bound = np.float32(math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns)))
        unit = (bits.random_raw(rows * columns) & (2**24 - 1)) * 2.0**-24
        return (unit * np.float64(bound + bound) - np.float64(bound)).astype(np.float32).reshape(rows, columns)

    return draw(r, inputs), draw(outputs, r)


def attach_to(model: Decoder, config: AdapterConfig, key: jax.Array) -> None:
    """Attaches fresh VeRA to the layers that a config names. Raises what `attach_vera` raises."""
    attach_vera(model, config.targets, VeRASettings(r=config.r, dropout=config.dropout))


def describe(config: AdapterConfig) -> str:
    """For people: `VeRA r=256 on all-linear`."""
    return f"VeRA r={config.r} on {config.target_modules}{described(config.dropout)}"


def attach_vera(model: Decoder, targets: tuple[str, ...], settings: VeRASettings) -> tuple[str, ...]:
    """Puts VeRA into the slot of each target, and the shared matrices into the model. Returns the layers' paths.

    Raises ModelError for a target that matches no layer, and for the LM head, because the loss uses it outside the
    model.
    """

    def make(layer: Layer, key: jax.Array) -> VeRA:
        *stack, _, outputs = weight(layer).get_value().shape
        side = layer.tp_side if isinstance(layer, Linear) else "outputs"
        return VeRA(outputs, settings, stack=tuple(stack), tp_side=side)

    layers = find(model, targets)
    if "lm_head" in layers:
        raise ModelError("adapter.kind='vera' shares its matrices among the layers; leave lm_head out of its targets")
    paths = attach(model, targets, make, jax.random.key(0))
    shapes = [weight(layer).get_value().shape[-2:] for layer in layers.values()]
    inputs, outputs = (max(sizes) for sizes in zip(*shapes, strict=True))
    a_rI, b_Or = draw_projections(settings.r, inputs, outputs, settings.seed)
    model.shared = Projections(a_rI, b_Or.T)
    return paths
