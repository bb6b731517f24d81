"""Layers that stay dense in a quantised model, because the files that it is read from keep them dense.

Whoever quantised the files left these layers out because their rounding costs most.
"""

from jaxft.models.family import FamilyConfig
from jaxft.models.tensor_map import ParamTensors, iter_params, unstacked_params
from jaxft.nn.decoder import Decoder
from jaxft.nn.stack import group_layers

KERNEL = "/kernel"


def layer_marks(config: FamilyConfig) -> tuple[frozenset[str], ...]:
    """The paths of the dense kernels of each layer. Layers with different marks must not share a stack."""
    marks: list[set[str]] = [set() for _ in range(config.num_hidden_layers)]
    for param in unstacked_params(config.tensors(), config.num_hidden_layers):
        layer = param.path.split("/")[1]
        if layer.isdecimal() and _is_dense(param, config):
            marks[int(layer)].add(param.path.split("/", 2)[2])
    return tuple(map(frozenset, marks))


def dense_layers(model: Decoder, config: FamilyConfig) -> frozenset[str]:
    """The paths of the layers of a model, made with these marks, whose kernels stay dense."""
    params = iter_params(config.tensors(), group_layers(model.segments))
    return frozenset(param.path.removesuffix(KERNEL) for param in params if _is_dense(param, config))


def _is_dense(param: ParamTensors, config: FamilyConfig) -> bool:
    # The experts of a layer are one array: all of them stay dense if one of them does.
    return param.path.endswith(KERNEL) and any(piece.hf in config.dense_tensors for piece in param.pieces)
