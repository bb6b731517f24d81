"""Partial fine-tuning: which parameters of a model move, by patterns on Hugging Face's names of its tensors.

A pattern is one or more parts of a dotted name, one after another: `lm_head`, `mlp`, `self_attn.q_proj`,
`layers.20-31`, `layers.0-3.mlp`. A part is a shell glob (`*norm*`) or a range of numbers with both ends. A pattern
with `-` in front takes away; where all take away, they do so from the whole model.
"""

import fnmatch
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.errors import ModelError, did_you_mean
from jaxft.models.tensor_map import ParamTensors, iter_params
from jaxft.nn.stack import group_layers

RANGE = re.compile(r"(\d+)-(\d+)")


def marks(config: Any, trainable: str) -> tuple[frozenset[str], ...]:
    """For each layer, the paths of its parameters that move. Layers of unlike marks must not share a stack.

    trainable: patterns, comma separated. Raises ModelError for a pattern that matches nothing or counts beyond the
    model's layers, for patterns that leave nothing to train, and where only some tensors of one array would move.
    """
    moving = _moving(config, trainable)
    out: list[set[str]] = [set() for _ in range(config.num_hidden_layers)]
    for placed in _arrays(config):
        layer = placed.path.split("/")[1]
        if layer.isdecimal() and placed.pieces[0].hf in moving:
            out[int(layer)].add(placed.path.split("/", 2)[2])
    return tuple(map(frozenset, out))


def mark(model: nnx.Module, trainable: str) -> None:
    """Writes the paths of what moves into `model.trainable_paths`, and makes these parameters float32.

    model: a Decoder that was made with the `marks` of the same patterns.
    """
    moving = _moving(model.config, trainable)
    placed = iter_params(model.config.tensors(), group_layers(model.segments))
    model.trainable_paths = frozenset(each.path for each in placed if each.pieces[0].hf in moving)
    state = nnx.state(model, lambda path, _: "/".join(map(str, path)) in model.trainable_paths)
    # bfloat16 would lose updates below its rounding.
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.float32), state))


def _arrays(config: Any) -> Iterator[ParamTensors]:
    """Every parameter as if each layer were a stack of its own."""
    return iter_params(config.tensors(), [(layer,) for layer in range(config.num_hidden_layers)])


def _moving(config: Any, trainable: str) -> frozenset[str]:
    """Hugging Face's names of the tensors that move."""
    names = [piece.hf for placed in _arrays(config) for piece in placed.pieces]
    patterns = [part.strip() for part in trainable.split(",") if part.strip()]
    moving = set(names) if all(pattern.startswith("-") for pattern in patterns) else set()
    for pattern in patterns:
        found = _matching(pattern.removeprefix("-"), names, config.tie_word_embeddings)
        moving = moving - found if pattern.startswith("-") else moving | found
    if not moving or not patterns:
        raise ModelError(f"model.trainable={trainable!r} leaves nothing to train: None trains all parameters")
    for placed in _arrays(config):
        taken = [piece.hf for piece in placed.pieces if piece.hf in moving]
        if taken and len(taken) < len(placed.pieces):
            raise ModelError(
                f"model.trainable={trainable!r} takes {len(taken)} of the {len(placed.pieces)} experts of "
                f"{placed.path}, {taken[0]} among them: the experts of a layer are one array and move together"
            )
    return frozenset(moving)


def _matching(pattern: str, names: list[str], tied: bool) -> set[str]:
    found = {name: at for name in names if (at := _place_of(pattern, name)) is not None}
    wanted = pattern.split(".")
    for index, part in enumerate(wanted):
        limits = RANGE.fullmatch(part)
        numbers = {int(name.split(".")[at + index]) for name, at in found.items()} if limits else set()
        if limits and not {int(limits[1]), int(limits[2])} <= numbers and _place_of_any(wanted, index, names):
            there = _place_of_any(wanted, index, names)
            raise ModelError(f"model.trainable pattern {pattern!r}: {part} is not within {min(there)}-{max(there)}")
    if found:
        return set(found)
    known = {end for name in names for end in _parts_of(re.sub(r"\.\d+\.", ".*.", name.removesuffix(".weight")))}
    head = " The head is tied to embed_tokens: name that." if tied and "lm_head" in wanted else ""
    raise ModelError(
        f"model.trainable pattern {pattern!r} matches no parameter.{head or did_you_mean(pattern, sorted(known))} "
        "Patterns are parts of Hugging Face's names, such as 'layers.0-3.mlp', '*norm*' or 'embed_tokens'."
    )


def _place_of(pattern: str, name: str) -> int | None:
    """The part of the name at which the pattern begins to match."""
    wanted, parts = pattern.split("."), name.split(".")
    for at in range(len(parts) - len(wanted) + 1):
        if all(_fits(w, part) for w, part in zip(wanted, parts[at:], strict=False)):
            return at
    return None


def _place_of_any(wanted: list[str], index: int, names: list[str]) -> set[int]:
    """The numbers that stand in a name where the pattern has a range."""
    loose = ".".join([*wanted[:index], "[0-9]*", *wanted[index + 1 :]])
    return {int(name.split(".")[at + index]) for name in names if (at := _place_of(loose, name)) is not None}


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
