"""Modules of the base that are trained in full together with adapters: PEFT's modules_to_save."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from flax import nnx

from jaxft.adapters.attach import CarriedParam, SavedParam, adapters
from jaxft.errors import ModelError, did_you_mean
from jaxft.nn.decoder import Decoder
from jaxft.nn.linear import Embedding, Linear
from jaxft.nn.norm import Norm
from jaxft.nn.score import ScoreHead
from jaxft.quant import is_quantized
from jaxft.trees import flatten


def train_whole(model: Decoder, names: Sequence[str]) -> tuple[str, ...]:
    """Makes the parameters of modules trainable, in float32, and returns the modules' paths.

    names: last names of modules (`lm_head`, `norm`) or path endings. Raises ModelError for a name that matches no
    module, or a module that has an adapter.
    """
    modules = {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear | Embedding | Norm | ScoreHead) and "adapter" not in path
    }
    chosen = sorted({path for name in names for path in _matching(name, modules, tied=model.tied)})
    adapted = [path for path in chosen if path in adapters(model)]
    if adapted:
        raise ModelError(f"{adapted[0]} has an adapter and is in modules_to_save: take it out of one of them")
    for path in chosen:
        module = modules[path]
        for name, param in list(vars(module).items()):
            if isinstance(param, nnx.Param):
                setattr(module, name, SavedParam(param.get_value().astype(jnp.float32)))
    return tuple(chosen)


def mark(model: Decoder, kinds: Mapping[str, type[nnx.Param]]) -> None:
    """Gives parameters another kind: SavedParam, which is trained in float32, or CarriedParam, which is not.

    kinds: by the parameter's path. Raises ModelError for a parameter that is quantized, and would be trained.
    """
    modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    for path, kind in kinds.items():
        module, _, name = path.rpartition("/")
        value = getattr(modules[module], name).get_value()
        if kind is SavedParam and is_quantized(value):
            raise ModelError(
                f"{path} was trained in full (modules_to_save), which a quantized parameter cannot be: load the model "
                "without quantization"
            )
        setattr(modules[module], name, kind(value.astype(jnp.float32) if kind is SavedParam else value))


def saved_paths(model: nnx.Module) -> tuple[str, ...]:
    """Paths of the parameters that are trained in full together with adapters."""
    return tuple(flatten(nnx.state(model, SavedParam))[0])


def carried_paths(model: nnx.Module) -> tuple[str, ...]:
    """Paths of the parameters that an adapter's folder replaces without training them."""
    return tuple(flatten(nnx.state(model, CarriedParam), is_quantized)[0])


def _matching(name: str, modules: Mapping[str, nnx.Module], *, tied: bool) -> list[str]:
    paths = [path for path in modules if path == name or path.endswith("/" + name)]
    if not paths:
        known = sorted({path.rsplit("/", 1)[-1] for path in modules})
        is_head = tied and name == "lm_head"
        why = " The LM head is embed_tokens (tie_word_embeddings)." if is_head else did_you_mean(name, known)
        raise ModelError(f"modules_to_save: {name!r} matches no module.{why} This model has {', '.join(known)}.")
    return paths
