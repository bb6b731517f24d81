"""LoftQ: LoRA initialised to correct the quantisation error of its base (arXiv:2311.08659).

This is the last half of a step of algorithm 1: the base stays as it was quantised, and A and B are set once, as PEFT's
`replace_lora_weights_loftq` does.
"""

# I inputs, O outputs, r rank

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.adapters.attach import adapters, key_of, linears
from jaxft.adapters.lora.low_rank import LoRA
from jaxft.adapters.lora.start import LOFTQ, leading_singular_vectors
from jaxft.checkpoint.hf import param_tensors
from jaxft.checkpoint.tensors import TensorSource
from jaxft.errors import ModelError
from jaxft.models.tensor_map import ParamTensors
from jaxft.nn.decoder import Decoder
from jaxft.quant import QuantizedArray, dense
from jaxft.sharding.arrays import to_host


def initialize_loftq(module: Decoder, source: TensorSource, init: str, key: jax.Array) -> None:
    """Sets A and B of every LoRA on a quantised kernel to the best low-rank approximation of its error.

    The error is that of quantisation. source: the base in its own precision, read one matrix at a time. init: `loftq`,
    by a full decomposition, or `loftq_niter_N`, approximately, by N steps of subspace iteration. Every process does the
    same work.
    Raises ModelError for an adapter on anything but a quantised Linear.
    """
    layers, table = dict(linears(module)), param_tensors(module)
    for path, adapter in adapters(module).items():
        kernel: object = layers[path].kernel.get_value() if path in layers else None
        if not isinstance(kernel, QuantizedArray) or not isinstance(adapter, LoRA):
            raise ModelError(
                f"adapter.init_lora_weights={init!r} corrects quantisation error, but {path} is not a quantised "
                "Linear: leave it out of adapter.target_modules"
            )
        a, b = _halves(kernel, adapter, table[f"{path}/kernel"], source, init, key_of(key, path))
        adapter.lora_a.set_value(jnp.asarray(a))
        adapter.lora_b.set_value(jnp.asarray(b))


def _iterations(init: str) -> str | None:
    match = LOFTQ.fullmatch(init)
    if match is None:
        raise ModelError(f"adapter.init_lora_weights={init!r} is not `loftq` or `loftq_niter_N`")
    return match[1]


def _halves(
    kernel: QuantizedArray, adapter: LoRA, param: ParamTensors, source: TensorSource, init: str, key: jax.Array
) -> tuple[np.ndarray, np.ndarray]:
    a, b = (np.zeros(half.get_value().shape, np.float32) for half in (adapter.lora_a, adapter.lora_b))
    for piece in param.pieces:
        settings = adapter.settings if adapter.stack_settings is None else adapter.stack_settings[piece.at[0]]
        if settings is None:
            continue
        exact_IO = param.transform.from_hf(source.read(piece.hf)).astype(np.float32)
        error_IO = exact_IO - to_host(dense(kernel[piece.at], jnp.float32))
        layer_key = jax.random.fold_in(key, piece.layer or 0)
        u_Ir, s_r, v_rO = leading_singular_vectors(jnp.asarray(error_IO), layer_key, settings.r, _iterations(init))
        root_r1 = np.sqrt(np.asarray(s_r) / settings.scale)[:, None]
        a[piece.at][: settings.r], b[piece.at][: settings.r] = root_r1 * np.asarray(u_Ir).T, root_r1 * np.asarray(v_rO)
    return a, b
