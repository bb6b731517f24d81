"""Quantises the kernels of a model's linear layers, and chooses the type of their products."""

from collections.abc import Collection
from typing import cast

import jax
from flax import nnx

from jaxft.errors import ModelError, listed
from jaxft.nn.experts.layer import ExpertLinear
from jaxft.nn.linear import Linear
from jaxft.nn.residual import altup
from jaxft.quant import FORMATS, Format, QuantizedArray
from jaxft.quant.narrow import MatmulDtype

# Layers that are not quantised: rounding of the LM head would directly change every probability, and AltUp's matrices
# have few numbers, too few for blocks.
EXCLUDED = ("lm_head", *altup.SMALL)


def kernels(model: nnx.Module) -> dict[str, Linear | ExpertLinear]:
    """Every layer whose kernel can be quantised, including experts, by path."""
    modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    return {
        path: module
        for path, module in sorted(modules.items())
        if isinstance(module, (Linear, ExpertLinear)) and path.rsplit("/", 1)[-1] not in EXCLUDED
    }


def quantize(model: nnx.Module, format: Format, *, dense: Collection[str] = ()) -> None:
    """Replaces every kernel of `kernels` by a quantised one. Works on abstract models under `nnx.eval_shape`.

    dense: paths of layers that are left as they are. Raises ModelError if a layer's number of inputs is not a multiple
    of the format's block.
    """
    layers = {path: layer for path, layer in kernels(model).items() if path not in dense}
    uneven = [
        f"{path} has {layer.kernel.get_value().shape[-2]}"
        for path, layer in layers.items()
        if format.block and layer.kernel.get_value().shape[-2] % format.block
    ]
    if uneven:
        whole = ", ".join(name for name, other in FORMATS.items() if other.block is None)
        raise ModelError(
            f"{format.name} quantises blocks of {format.block} inputs, but the inputs of these layers are no multiple "
            f"of {format.block}: {listed(uneven)}. Use {whole}, which has no blocks."
        )
    for layer in layers.values():
        layer.kernel.set_value(format.quantize(cast(jax.Array, layer.kernel.get_value())))


def has_quantized_kernels(model: nnx.Module) -> bool:
    """Whether any kernel of a model is quantised."""
    return any(isinstance(layer.kernel.get_value(), QuantizedArray) for layer in kernels(model).values())


def use_matmul(model: nnx.Module, matmul_dtype: MatmulDtype | None) -> None:
    """Has every layer of `kernels` multiply operands in this type from now on, experts excepted; None: as before."""
    for layer in kernels(model).values():
        if isinstance(layer, Linear):
            layer.matmul_dtype = matmul_dtype
