"""A model whose linear layers keep their kernels quantised."""

from flax import nnx

from jaxft.errors import ModelError
from jaxft.nn.experts.layer import ExpertLinear
from jaxft.nn.linear import Linear
from jaxft.quant import FORMATS, Format, QuantizedArray

# Layers that stay as they are: the head's rounding would go straight into every probability.
KEPT = ("lm_head",)


def kernels(model: nnx.Module) -> dict[str, Linear | ExpertLinear]:
    """Every layer whose kernel can be quantised, experts included, by its path."""
    found = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    return {
        path: module
        for path, module in sorted(found.items())
        if isinstance(module, (Linear, ExpertLinear)) and path.rsplit("/", 1)[-1] not in KEPT
    }


def quantize(model: nnx.Module, format: Format) -> None:
    """Puts a quantised value in the place of every such kernel. Works on abstract models under `nnx.eval_shape`.

    Raises ModelError where a layer's inputs do not divide into blocks.
    """
    layers = kernels(model)
    uneven = [
        f"{path} has {layer.kernel.get_value().shape[-2]}"
        for path, layer in layers.items()
        if format.block and layer.kernel.get_value().shape[-2] % format.block
    ]
    if uneven:
        whole = ", ".join(name for name, other in FORMATS.items() if other.block is None)
        raise ModelError(
            f"{format.name} takes blocks of {format.block} inputs of a layer, which do not divide those of this model: "
            f"{', '.join(uneven[:6])}. Use {whole}, which has no blocks."
        )
    for layer in layers.values():
        layer.kernel.set_value(format.quantize(layer.kernel.get_value()))


def has_quantized_kernels(model: nnx.Module) -> bool:
    """Whether any kernel of a model is."""
    return any(isinstance(layer.kernel.get_value(), QuantizedArray) for layer in kernels(model).values())
