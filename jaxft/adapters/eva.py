"""EVA: LoRA whose A begins with the directions in which a layer's inputs vary most (arXiv:2410.07170).

They are the principal components of the inputs, which the paper finds by an incremental SVD. Here it is subspace
iteration (arXiv:0909.4061, algorithm 4.4), whose step takes no more memory than A's gradient: for directions A the sum
of `(x A^T)^T x` over all tokens is what a layer hands back in that gradient's place. Ranks stay as they are set: of the
paper's two parts the other one, which shares ranks out by explained variance, is left out (PEFT's `rho=1`).
"""

# B batch, S sequence, I inputs, r rank, Q directions that are followed

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.adapters.attach import adapters, key_of, linears, slots
from jaxft.adapters.lora_start import EVA
from jaxft.adapters.low_rank import HALF_DIMS, WHOLE, half_storage
from jaxft.errors import ModelError
from jaxft.nn import partition
from jaxft.nn.adapter import Adapter
from jaxft.nn.linear import TPSide
from jaxft.nn.storage import StorageDims
from jaxft.sharding.mesh import MeshPlan

BATCHES, STEPS = 8, 4
MORE = 8  # directions beyond the rank: what lies far behind the last one is told apart sooner


class Directions(NamedTuple):
    """Of one layer or a stack of them. lora_a: [*stack, Q, I], named for the path rules. total: [*stack, I], zeros.

    As a gradient, lora_a is the sum of `(x lora_a^T)^T x` and total that of x.
    """

    lora_a: jax.Array
    total: jax.Array


class Probe(Adapter):
    """Lets a layer's inputs through. What is lent to it says which of them count, [B, S]."""

    def __init__(self, directions: Directions, tp_side: str) -> None:
        super().__init__()
        self.lora_a, self.total = map(nnx.Param, directions)
        self.tp_side = tp_side

    def enter(self, x: jax.Array) -> jax.Array:
        """x itself."""
        split = self.tp_side == "inputs"
        a = partition.gathered(self.lora_a.get_value(), HALF_DIMS[split], WHOLE[split])
        return _probed(x, self.shared, a, self.total.get_value())

    def storage_dims(self) -> dict[str, StorageDims]:
        return directions_storage(self.tp_side)


def directions_storage(tp_side: TPSide) -> dict[str, StorageDims]:
    """How Directions are split over devices: lora_a as LoRA's is, total whole."""
    return {"lora_a": half_storage(tp_side == "inputs"), "total": StorageDims((None,), slight=True)}


@jax.custom_vjp
def _probed(x: jax.Array, counts_BS: jax.Array, a_QI: jax.Array, total_I: jax.Array) -> jax.Array:
    return x


def _probed_forward(x: jax.Array, counts_BS: jax.Array, a_QI: jax.Array, _: jax.Array) -> tuple[jax.Array, Any]:
    return x, (x, counts_BS, a_QI)


def _probed_backward(residuals: Any, grad: jax.Array) -> tuple[jax.Array, ...]:
    x, counts_BS, a_QI = residuals
    rows_BSI = x.astype(jnp.float32) * counts_BS[..., None]
    low_BSQ = jnp.einsum("bsi,qi->bsq", rows_BSI, a_QI, precision="highest")
    sum_QI = jnp.einsum("bsq,bsi->qi", low_BSQ, rows_BSI, precision="highest")
    return grad, jnp.zeros_like(counts_BS), sum_QI, jnp.sum(rows_BSI, (0, 1))


_probed.defvjp(_probed_forward, _probed_backward)


class _Counts:
    """What `Decoder.shared` lends to adapters: 1 for a token, 0 for padding."""

    def __init__(self, segments_BS: jax.Array) -> None:
        self.counts_BS = (segments_BS > 0).astype(jnp.float32)

    def arrays(self, _: Any) -> jax.Array:
        return self.counts_BS


def check(module: nnx.Module, init: str) -> None:
    """Raises ModelError for a LoRA on anything but a Linear of the layers. module: may be abstract."""
    layers = dict(linears(module))
    for path in adapters(module):
        if path not in layers or not path.startswith("layers/"):
            raise ModelError(
                f"adapter.init_lora_weights={init!r} looks at the inputs of matrices within the layers, and {path} is "
                "none: leave it out of adapter.target_modules"
            )


def begin(module: nnx.Module, init: str, batch: Callable[[int], Any], mesh: MeshPlan, key: jax.Array) -> None:
    """Sets A of every LoRA of a model to the first r principal components of its inputs, rows of length one.

    init: `eva`, or `eva_niter_N` for N steps. batch(number): a Batch on the devices; the first BATCHES of a run are
    looked at, each once a step. B stays zero, so the model stays what it was. Raises what `check` raises.
    """
    check(module, init)
    steps, found = int(EVA.fullmatch(init)[1] or STEPS), adapters(module)
    bases = {f"{path}/adapter": _drawn(adapter, key_of(key, path)) for path, adapter in found.items()}
    dims = {
        f"{path}/adapter/{name}": storage
        for path, adapter in found.items()
        for name, storage in directions_storage(adapter.tp_side).items()
    }
    bases = mesh.shard(bases, dims)
    shardings = jax.tree.map(lambda x: x.sharding, bases)
    graphdef, state = nnx.split(module)

    def outcome(bases: dict[str, Directions], state: Any, batch: Any) -> jax.Array:
        model = nnx.merge(graphdef, state)
        model.shared = _Counts(batch.segments_BS)
        for path, layer in slots(model):
            if f"{path}/adapter" in bases:
                layer.adapter = Probe(bases[f"{path}/adapter"], layer.tp_side)
        hidden_BSD, _ = model(batch.tokens_BS, batch.positions_BS, batch.segments_BS)
        return jnp.sum(hidden_BSD.astype(jnp.float32))

    look = jax.jit(mesh.within(jax.grad(outcome)), out_shardings=shardings)
    turn = jax.jit(_turned, static_argnums=3, out_shardings=shardings)
    for step in range(steps):
        sums, tokens = None, 0
        for number in range(BATCHES):
            given = batch(number)
            seen = look(bases, state, given)
            sums = seen if sums is None else jax.tree.map(jnp.add, sums, seen)
            tokens += jnp.sum(given.segments_BS > 0)
        bases = turn(bases, sums, tokens, step == steps - 1)
    for path, adapter in found.items():
        adapter.begin_with(bases[f"{path}/adapter"].lora_a[..., : adapter.settings.r, :])


def _drawn(adapter: Any, key: jax.Array) -> Directions:
    *stack, r, inputs = adapter.lora_a.get_value().shape
    drawn = jax.random.normal(key, (*stack, min(r + MORE, inputs), inputs), jnp.float32)
    return Directions(_orthonormal(drawn), jnp.zeros((*stack, inputs), jnp.float32))


def _turned(bases: dict[str, Directions], sums: dict[str, Directions], tokens: jax.Array, last: bool) -> Any:
    """The next directions, or at last the same space's own, the one with most variance first."""

    def turned(base: Directions, summed: Directions) -> Directions:
        a_QI, mean_I = base.lora_a, summed.total / tokens
        towards_Q = jnp.einsum("...qi,...i->...q", a_QI, summed.total, precision="highest")
        varied_QI = summed.lora_a - towards_Q[..., None] * mean_I[..., None, :]
        if not last:
            return base._replace(lora_a=_orthonormal(varied_QI))
        varied_QQ = jnp.einsum("...qi,...pi->...qp", varied_QI, a_QI, precision="highest")
        _, vectors_QQ = jnp.linalg.eigh(varied_QQ)  # of the smallest first
        return base._replace(lora_a=jnp.einsum("...qp,...qi->...pi", vectors_QQ[..., ::-1], a_QI, precision="highest"))

    return {path: turned(base, sums[path]) for path, base in bases.items()}


def _orthonormal(rows_QI: jax.Array) -> jax.Array:
    return jnp.linalg.qr(rows_QI.mT)[0].mT
