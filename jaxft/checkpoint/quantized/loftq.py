"""LoftQ: LoRA that begins with what quantising its base has lost (arXiv:2311.08659).

Of algorithm 1 this is the last half of a step: the base stays as it was quantised, and A and B are set once, as PEFT's
`replace_lora_weights_loftq` does.
"""

# I inputs, O outputs, r rank

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft.adapters.attach import adapters, key_of, linears
from jaxft.adapters.lora_start import LOFTQ, leading_singular_vectors
from jaxft.checkpoint.hf import param_tensors
from jaxft.checkpoint.tensors import TensorSource
from jaxft.errors import ModelError
from jaxft.models.tensor_map import ParamTensors
from jaxft.quant import dense, is_quantized
from jaxft.sharding.arrays import to_host


def begin(module: nnx.Module, source: TensorSource, init: str, key: jax.Array) -> None:
    """Sets A and B of every LoRA on a quantised kernel to the best of their rank for what the kernel has lost.

    source: of the base in its own precision, read one matrix at a time. init: `loftq`, by a whole decomposition, or
    `loftq_niter_N`, nearly so, by N steps of subspace iteration. Every process does the same work.
    Raises ModelError for an adapter beside anything but a quantised Linear.
    """
    layers, table = dict(linears(module)), param_tensors(module)
    for path, adapter in adapters(module).items():
        if path not in layers or not is_quantized(layers[path].kernel.get_value()):
            raise ModelError(
                f"adapter.init_lora_weights={init!r} makes up for what quantising loses, but {path} is no quantised "
                "Linear: leave it out of adapter.target_modules"
            )
        a, b = _halves(
            layers[path].kernel.get_value(), adapter, table[f"{path}/kernel"], source, init, key_of(key, path)
        )
        adapter.lora_a.set_value(jnp.asarray(a))
        adapter.lora_b.set_value(jnp.asarray(b))


def _halves(
    kernel: object, adapter: nnx.Module, placed: ParamTensors, source: TensorSource, init: str, key: jax.Array
) -> tuple[np.ndarray, np.ndarray]:
    a, b = (np.zeros(half.get_value().shape, np.float32) for half in (adapter.lora_a, adapter.lora_b))
    for piece in placed.pieces:
        settings = adapter.settings if adapter.places is None else adapter.places[piece.at[0]]
        if settings is None:
            continue
        exact_IO = placed.transform.from_hf(source.read(piece.hf)).astype(np.float32)
        lost_IO = exact_IO - to_host(dense(kernel[piece.at], jnp.float32))
        steps = LOFTQ.fullmatch(init)[1]
        u_Ir, s_r, v_rO = leading_singular_vectors(
            jnp.asarray(lost_IO), jax.random.fold_in(key, piece.layer or 0), settings.r, steps
        )
        root_r1 = np.sqrt(np.asarray(s_r) / settings.scale)[:, None]
        a[piece.at][: settings.r], b[piece.at][: settings.r] = root_r1 * np.asarray(u_Ir).T, root_r1 * np.asarray(v_rO)
    return a, b
