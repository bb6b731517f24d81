"""Model families, one file each: `Config.from_hf`, `Config.tensors`, `Model`."""

import functools
import importlib
import math
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.errors import ModelError, did_you_mean
from jaxft.models import families as shelf
from jaxft.models import freezing, nested
from jaxft.nn.quantized import quantize
from jaxft.quant import FORMATS, is_quantized


@functools.cache
def families() -> dict[str, ModuleType]:
    """The module of every implemented Hugging Face `model_type`."""
    modules = (
        importlib.import_module(f"{shelf.__name__}.{found.name}") for found in pkgutil.iter_modules(shelf.__path__)
    )
    return {kind: module for module in modules for kind in getattr(module, "MODEL_TYPES", ())}


def config_from_hf(hf: Mapping[str, Any]) -> Any:
    """The family's Config of a parsed `config.json`; of the language model where that is nested in a larger one.

    Raises ModelError for a family that is not implemented.
    """
    hf = nested.text_config(hf)
    kind, inner = hf.get("model_type"), hf.get("text_config")
    if kind not in families() and isinstance(inner, Mapping):
        raise nested.missing_text_model(kind, inner.get("model_type"))
    if kind not in families():
        hint = did_you_mean(str(kind), families())
        code = " Code that a folder brings along (auto_map) is never run." if hf.get("auto_map") else ""
        known = ", ".join(sorted(families()))
        raise ModelError(f"model_type {kind!r} is not implemented.{hint}{code} Implemented: {known}.")
    return families()[kind].Config.from_hf(hf)


def text_config(hf: Mapping[str, Any], *, own_head: bool | None = None) -> dict[str, Any]:
    """The whole config.json of a nested language model as a model of its own; `hf` where it is not nested.

    own_head: as for `nested.text_config`. Raises ModelError for what is not understood.
    """
    if hf.get("model_type") not in nested.MULTIMODAL:
        return dict(hf)
    inner = nested.text_config(hf, own_head=own_head)
    return config_from_hf(inner).to_hf() | {k: v for k, v in inner.items() if k in nested.SHARED}


def abstract_model(config: Any, **options: Any) -> Any:
    """`random_model` with ShapeDtypeStructs for parameters: any size, no memory."""
    return nnx.eval_shape(lambda: random_model(config, seed=0, **options))


def random_model(
    config: Any,
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
    remat: str = "none",
    quantization: str | None = None,
    trainable: str | None = None,
    seed: int,
) -> Any:
    """The model with freshly drawn parameters.

    quantization: a name of `quant.FORMATS`, for its linear layers. trainable: patterns of the parameters that training
    moves, which are float32; see `models.freezing`.
    """
    module = importlib.import_module(type(config).__module__)
    model = module.Model(
        config,
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.dtype(param_dtype),
        remat=remat,
        rngs=nnx.Rngs(params=jax.random.key(seed)),
        marks=None if trainable is None else freezing.marks(config, trainable),
    )
    if trainable is not None:
        freezing.mark(model, trainable)
    if quantization is not None:
        quantize(model, FORMATS[quantization])
    return model


def parameter_count(model: Any) -> int:
    """Numbers in all parameters, adapters included."""
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param), is_leaf=is_quantized)
    return sum(math.prod(leaf.shape) for leaf in leaves)
