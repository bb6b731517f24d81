"""Partial fine-tuning: chooses the trainable parameters by patterns on Hugging Face's tensor names.

A pattern is one or more consecutive parts of a dotted name: `lm_head`, `mlp`, `self_attn.q_proj`, `layers.20-31`,
`layers.0-3.mlp`. A part is a shell glob (`*norm*`) or a range of numbers, both ends included. A pattern that begins
with `-` removes what it matches; if all patterns do, they remove from the whole model.
"""

import fnmatch
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.errors import ModelError, did_you_mean
from jaxft.models.family import FamilyConfig
from jaxft.models.tensor_map import iter_params, unstacked_params
from jaxft.nn.decoder import Decoder
from jaxft.nn.param_kind import Constant
from jaxft.nn.stack import group_layers
from jaxft.trees import flatten

RANGE = re.compile(r"(\d+)-(\d+)")


def layer_marks(config: FamilyConfig, trainable: str) -> tuple[frozenset[str], ...]:
    """The paths of the trainable parameters of each layer. Layers with different marks must not share a stack.

    trainable: comma-separated patterns. Raises ModelError for a pattern that matches nothing or a range beyond the
    model's layers, if no parameter is left to train, and if only some of the tensors of one array would be trained.
    """
    trained = _trained_tensors(config, trainable)
    marks: list[set[str]] = [set() for _ in range(config.num_hidden_layers)]
    for param in unstacked_params(config.tensors(), config.num_hidden_layers):
        layer = param.path.split("/")[1]
        if layer.isdecimal() and param.pieces[0].hf in trained:
            marks[int(layer)].add(param.path.split("/", 2)[2])
    return tuple(map(frozenset, marks))


def mark_trainable(model: Decoder, config: FamilyConfig, trainable: str) -> None:
    """Sets `model.trainable_paths` and makes these parameters float32.

    model: made from `config`, with the `layer_marks` of the same patterns.
    """
    trained = _trained_tensors(config, trainable)
    params = iter_params(config.tensors(), group_layers(model.segments))
    paths = frozenset(param.path for param in params if param.pieces[0].hf in trained) - _constants(model)
    if config.head == "score":
        paths |= {"value/weight"}  # a fresh head is always trained
    model.trainable_paths = paths
    state = nnx.state(model, lambda path, _: "/".join(map(str, path)) in paths)
    # bfloat16 would lose updates below its rounding.
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.float32), state))


def _constants(model: Decoder) -> frozenset[str]:
    """The paths of what is never trained, whatever the patterns name."""
    return frozenset(flatten(nnx.state(model, Constant))[0])


def _trained_tensors(config: FamilyConfig, trainable: str) -> frozenset[str]:
    """Hugging Face's names of the tensors that the patterns choose."""
    params = list(unstacked_params(config.tensors(), config.num_hidden_layers))
    names = [piece.hf for param in params for piece in param.pieces]
    patterns = [part.strip() for part in trainable.split(",") if part.strip()]
    tied = config.tie_word_embeddings and config.head == "vocabulary"
    trained = set(names) if all(pattern.startswith("-") for pattern in patterns) else set()
    for pattern in patterns:
        matches = _matching(pattern.removeprefix("-"), names, tied)
        trained = trained - matches if pattern.startswith("-") else trained | matches
    if not trained or not patterns:
        raise ModelError(f"model.trainable={trainable!r} leaves nothing to train. Set it to None to train everything.")
    for param in params:
        taken = [piece.hf for piece in param.pieces if piece.hf in trained]
        if taken and len(taken) < len(param.pieces):
            raise ModelError(
                f"model.trainable={trainable!r} takes {len(taken)} of the {len(param.pieces)} experts of {param.path}, "
                f"such as {taken[0]}, but the experts of a layer are one array and can only be trained together: name "
                "all of them or none"
            )
    return frozenset(trained)


def _matching(pattern: str, names: list[str], tied: bool) -> set[str]:
    starts = {name: start for name in names if (start := _match_start(pattern, name)) is not None}
    parts = pattern.split(".")
    for index, part in enumerate(parts):
        limits = RANGE.fullmatch(part)
        if limits is None:
            continue
        matched = {int(name.split(".")[start + index]) for name, start in starts.items()}
        if {int(limits[1]), int(limits[2])} <= matched:
            continue
        if known := _numbers_at(parts, index, names):
            raise ModelError(f"model.trainable pattern {pattern!r}: {part} is not within {min(known)}-{max(known)}")
    if starts:
        return set(starts)
    endings = {end for name in names for end in _parts_of(re.sub(r"\.\d+\.", ".*.", name.removesuffix(".weight")))}
    hint = did_you_mean(pattern, sorted(endings))
    if tied and "lm_head" in parts:
        hint = " The head is tied to embed_tokens: name that."
    raise ModelError(
        f"model.trainable pattern {pattern!r} matches no parameter.{hint} "
        "Patterns are parts of Hugging Face's names, such as 'layers.0-3.mlp', '*norm*' or 'embed_tokens'."
    )


def _match_start(pattern: str, name: str) -> int | None:
    """The index of the name's part at which the pattern begins to match, None if it does not."""
    wanted, parts = pattern.split("."), name.split(".")
    for start in range(len(parts) - len(wanted) + 1):
        if all(_fits(w, part) for w, part in zip(wanted, parts[start:], strict=False)):
            return start
    return None


def _numbers_at(parts: list[str], index: int, names: list[str]) -> set[int]:
    """The numbers that names have at the pattern's part `index`, a range."""
    loose = ".".join([*parts[:index], "[0-9]*", *parts[index + 1 :]])
    return {int(name.split(".")[start + index]) for name in names if (start := _match_start(loose, name)) is not None}


def _fits(wanted: str, part: str) -> bool:
    limits = RANGE.fullmatch(wanted)
    if limits is None:
        return fnmatch.fnmatchcase(part, wanted)
    return part.isdecimal() and int(limits[1]) <= int(part) <= int(limits[2])


def _parts_of(name: str) -> Iterator[str]:
    parts = name.split(".")
    for start in range(len(parts)):
        for stop in range(start + 1, len(parts) + 1):
            yield ".".join(parts[start:stop])
