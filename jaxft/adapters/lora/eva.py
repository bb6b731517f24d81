"""EVA: LoRA with an initial A of the directions in which a layer's inputs vary most (arXiv:2410.07170).

These are the principal components of the inputs, which the paper computes by an incremental SVD. Here they come from
subspace iteration (arXiv:0909.4061, algorithm 4.4), whose step takes no more memory than A's gradient: in place of that
gradient, a layer with directions A returns the sum of `(x A^T)^T x` over all tokens. Ranks are those of the config. The
other part of the paper, the distribution of ranks by explained variance, is left out (PEFT's `rho=1`).
"""

# B batch, S sequence, I inputs, r rank, Q directions that are followed

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxft.adapters.attach import adapters, key_of, linears
from jaxft.adapters.lora.low_rank import HALF_DIMS, WHOLE, LoRA, half_storage
from jaxft.adapters.lora.start import EVA
from jaxft.data.batch import Batch
from jaxft.errors import ModelError
from jaxft.nn import partition
from jaxft.nn.adapter import Adapter
from jaxft.nn.decoder import Decoder
from jaxft.nn.linear import TPSide
from jaxft.nn.storage import StorageDims
from jaxft.sharding.mesh import MeshPlan

BATCHES, STEPS = 8, 4
OVERSAMPLING = 8  # directions beyond the rank: subspace iteration converges faster with a few more


class Directions(NamedTuple):
    """The directions of one layer or of a stack. lora_a: [*stack, Q, I], split over devices like LoRA's A. total:
    [*stack, I], 0.

    The gradient of lora_a is the sum of `(x lora_a^T)^T x` over tokens, that of total the sum of x.
    """

    lora_a: jax.Array
    total: jax.Array


class Probe(Adapter):
    """Passes a layer's inputs through and collects their sums. `shared` is 1 for tokens and 0 for padding, [B, S]."""

    def __init__(self, directions: Directions, tp_side: TPSide) -> None:
        super().__init__()
        self.lora_a, self.total = map(nnx.Param, directions)
        self.tp_side = tp_side

    def enter(self, x: jax.Array) -> jax.Array:
        split = self.tp_side == "inputs"
        a = partition.gather(self.lora_a.get_value(), HALF_DIMS[split], WHOLE[split])
        return _probe(x, self.shared, a, self.total.get_value())

    def storage_dims(self) -> dict[str, StorageDims]:
        return directions_storage(self.tp_side)


def directions_storage(tp_side: TPSide) -> dict[str, StorageDims]:
    """How stored Directions are split over devices: lora_a like LoRA's, total not at all."""
    return {"lora_a": half_storage(tp_side == "inputs"), "total": StorageDims((None,), may_be_whole=True)}


Residuals = tuple[jax.Array, jax.Array, jax.Array]  # x, which rows are tokens, directions


@jax.custom_vjp
def _probe(x: jax.Array, counts_BS: jax.Array, a_QI: jax.Array, total_I: jax.Array) -> jax.Array:
    return x


def _probe_forward(x: jax.Array, counts_BS: jax.Array, a_QI: jax.Array, _: jax.Array) -> tuple[jax.Array, Residuals]:
    return x, (x, counts_BS, a_QI)


def _probe_backward(residuals: Residuals, grad: jax.Array) -> tuple[jax.Array, ...]:
    x, counts_BS, a_QI = residuals
    rows_BSI = x.astype(jnp.float32) * counts_BS[..., None]
    low_BSQ = jnp.einsum("bsi,qi->bsq", rows_BSI, a_QI, precision="highest")
    sum_QI = jnp.einsum("bsq,bsi->qi", low_BSQ, rows_BSI, precision="highest")
    return grad, jnp.zeros_like(counts_BS), sum_QI, jnp.sum(rows_BSI, (0, 1))


_probe.defvjp(_probe_forward, _probe_backward)


class _TokenCounts:
    """A module for the slot `Decoder.shared`, whose array is 1 for a token and 0 for padding."""

    def __init__(self, segments_BS: jax.Array) -> None:
        self.counts_BS = (segments_BS > 0).astype(jnp.float32)

    def arrays(self, dtype: DTypeLike) -> jax.Array:
        return self.counts_BS


def check(module: Decoder, init: str) -> None:
    """Raises ModelError for a LoRA on anything but a Linear within the layers. module: may be abstract."""
    layers = dict(linears(module))
    for path in adapters(module):
        if path not in layers or not path.startswith("layers/"):
            raise ModelError(
                f"adapter.init_lora_weights={init!r} needs the inputs of matrices within the layers, and {path} is "
                "not one: leave it out of adapter.target_modules"
            )


def initialize_eva(module: Decoder, init: str, batch: Callable[[int], Batch], mesh: MeshPlan, key: jax.Array) -> None:
    """Sets A of every LoRA of a model to the first r principal components of its inputs, rows of length one.

    init: `eva`, or `eva_niter_N` for N steps. batch(number): a batch of the run, on the devices; the first BATCHES are
    used, each once in every step. B is still zero, so the model's outputs do not change. Raises what `check` raises.
    """
    check(module, init)
    steps, loras = _steps(init), {path: lora for path, lora in adapters(module).items() if isinstance(lora, LoRA)}
    bases = {f"{path}/adapter": _random_directions(lora, key_of(key, path)) for path, lora in loras.items()}
    bases = mesh.shard(bases, _storage_dims(loras))
    shardings = jax.tree.map(lambda x: x.sharding, bases)
    graphdef, state = nnx.split(module)

    def outcome(bases: dict[str, Directions], state: nnx.State, batch: Batch) -> jax.Array:
        model = nnx.merge(graphdef, state)
        model.shared = _TokenCounts(batch.segments_BS)
        for path, layer in linears(model):
            if f"{path}/adapter" in bases:
                layer.adapter = Probe(bases[f"{path}/adapter"], layer.tp_side)
        hidden_BSD, _ = model(batch.tokens_BS, batch.positions_BS, batch.segments_BS)
        return jnp.sum(hidden_BSD.astype(jnp.float32))

    sums_of_batch = jax.jit(mesh.bind(jax.grad(outcome)), out_shardings=shardings)
    next_directions = jax.jit(_next_directions, static_argnums=3, out_shardings=shardings)
    for step in range(steps):
        sums: dict[str, Directions] | None = None
        tokens = jnp.int32(0)
        for number in range(BATCHES):
            rows = batch(number)
            added = sums_of_batch(bases, state, rows)
            sums = added if sums is None else jax.tree.map(jnp.add, sums, added)
            tokens += jnp.sum(rows.segments_BS > 0)
        bases = next_directions(bases, sums, tokens, step == steps - 1)
    for path, lora in loras.items():
        lora.set_a(bases[f"{path}/adapter"].lora_a[..., : lora.settings.r, :])


def _steps(init: str) -> int:
    match = EVA.fullmatch(init)
    return STEPS if match is None or match[1] is None else int(match[1])


def _storage_dims(loras: Mapping[str, LoRA]) -> dict[str, StorageDims]:
    return {
        f"{path}/adapter/{name}": storage
        for path, lora in loras.items()
        for name, storage in directions_storage(lora.tp_side).items()
    }


def _random_directions(lora: LoRA, key: jax.Array) -> Directions:
    *stack, r, inputs = lora.lora_a.get_value().shape
    drawn = jax.random.normal(key, (*stack, min(r + OVERSAMPLING, inputs), inputs), jnp.float32)
    return Directions(_orthonormal(drawn), jnp.zeros((*stack, inputs), jnp.float32))


def _next_directions(
    bases: dict[str, Directions], sums: dict[str, Directions], tokens: jax.Array, last: bool
) -> dict[str, Directions]:
    """The directions after one more step; after the last, the principal directions of the same space."""

    def advance(base: Directions, summed: Directions) -> Directions:
        a_QI, mean_I = base.lora_a, summed.total / tokens
        towards_Q = jnp.einsum("...qi,...i->...q", a_QI, summed.total, precision="highest")
        varied_QI = summed.lora_a - towards_Q[..., None] * mean_I[..., None, :]
        if not last:
            return base._replace(lora_a=_orthonormal(varied_QI))
        varied_QQ = jnp.einsum("...qi,...pi->...qp", varied_QI, a_QI, precision="highest")
        _, vectors_QQ = jnp.linalg.eigh(varied_QQ)  # of the smallest first
        return base._replace(lora_a=jnp.einsum("...qp,...qi->...pi", vectors_QQ[..., ::-1], a_QI, precision="highest"))

    return {path: advance(base, sums[path]) for path, base in bases.items()}


def _orthonormal(rows_QI: jax.Array) -> jax.Array:
    return jnp.linalg.qr(rows_QI.mT)[0].mT
