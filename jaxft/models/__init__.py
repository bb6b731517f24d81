"""Model families, and how to make a model of one: from its Config, drawn at random or abstract."""

import dataclasses
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
from jaxft.models import families as package
from jaxft.models import freezing, kept_dense, nested
from jaxft.models.family import FamilyConfig
from jaxft.models.field_kinds import check_config
from jaxft.models.hf_fields import DENSE_TENSORS, NULL_IS_ABSENT
from jaxft.models.score_model import as_score_model, is_score_model
from jaxft.nn.decoder import Decoder
from jaxft.nn.quantized import quantize
from jaxft.nn.score import Head
from jaxft.quant import FORMATS, is_quantized

# Model types of other names for a family: Kimi K2 is a DeepSeek V3 of other sizes.
ALIASES = {"kimi_k2": "deepseek_v3"}


@functools.cache
def families() -> dict[str, ModuleType]:
    """The module of every implemented Hugging Face `model_type`."""
    names = (info.name for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."))
    modules = map(importlib.import_module, names)
    return {kind: module for module in modules for kind in getattr(module, "MODEL_TYPES", ())}


def config_from_hf(hf: Mapping[str, Any]) -> FamilyConfig:
    """The family's Config of a parsed `config.json`; of a multimodal model, the Config of its language model.

    Raises ModelError for a family that is not implemented, for a field of the wrong kind, and for a classifier of
    several labels.
    """
    check_config(hf)
    hf = {k: v for k, v in nested.text_config(hf).items() if v is not None or k not in NULL_IS_ABSENT}
    kind, inner = hf.get("model_type"), hf.get("text_config")
    kind = ALIASES.get(str(kind), kind)
    if kind not in families() and isinstance(inner, Mapping):
        raise nested.unknown_multimodal(kind, inner.get("model_type"))
    if kind not in families():
        hint = did_you_mean(str(kind), families())
        code = " Code in the model's folder (auto_map) is never run." if hf.get("auto_map") else ""
        known = ", ".join(sorted(families()))
        raise ModelError(f"model_type {kind!r} is not implemented.{hint}{code} Implemented: {known}.")
    config = families()[kind].Config.from_hf(hf)
    head: Head = "score" if is_score_model(hf) else "vocabulary"
    return dataclasses.replace(config, head=head, dense_tensors=frozenset(hf.get(DENSE_TENSORS) or ()))


def score_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the reward model that a language model becomes; of a reward model, `hf` itself."""
    return dict(hf) if is_score_model(hf) else as_score_model(hf, config_from_hf(hf).score_architecture())


def text_config(hf: Mapping[str, Any], *, own_head: bool | None = None) -> dict[str, Any]:
    """The complete config.json of a multimodal model's language model; of any other model, `hf` itself.

    own_head: as for `nested.text_config`. Raises ModelError for fields that are not implemented.
    """
    if hf.get("model_type") not in nested.MULTIMODAL:
        return dict(hf)
    inner = nested.text_config(hf, own_head=own_head)
    return config_from_hf(inner).to_hf() | {k: v for k, v in inner.items() if k in nested.SHARED}


def abstract_model(config: FamilyConfig, **options: Any) -> Decoder:
    """`random_model` with ShapeDtypeStructs as parameters: any size, no memory."""
    return nnx.eval_shape(lambda: random_model(config, seed=0, **options))


def random_model(
    config: FamilyConfig,
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
    remat: str = "none",
    quantization: str | None = None,
    trainable: str | None = None,
    seed: int,
) -> Decoder:
    """A model with freshly drawn parameters.

    quantization: format of its linear layers, a name in `quant.FORMATS`; those with tensors in `config.dense_tensors`
    stay dense. trainable: patterns of the parameters to train
    (`models.freezing`), which become float32; None for all.
    """
    module = importlib.import_module(type(config).__module__)
    marks = None if trainable is None else freezing.layer_marks(config, trainable)
    if quantization is not None:
        marks = kept_dense.layer_marks(config)
    model = module.Model(
        config,
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.dtype(param_dtype),
        remat=remat,
        rngs=nnx.Rngs(params=jax.random.key(seed)),
        marks=marks,
    )
    if trainable is not None:
        freezing.mark_trainable(model, config, trainable)
    if quantization is not None:
        quantize(model, FORMATS[quantization], dense=kept_dense.dense_layers(model, config))
    return model


def parameter_count(model: nnx.Module) -> int:
    """How many numbers all parameters have together, adapters included."""
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param), is_leaf=is_quantized)
    return sum(math.prod(leaf.shape) for leaf in leaves)
