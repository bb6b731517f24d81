"""Kinds of parameters by their path, and optimizers that work by path.

Layers of one kind are stacked along a leading axis; an optimizer treats each of them as a parameter of its own.
"""

from dataclasses import dataclass

import optax

from jaxft.trees import flatten

# Vectors by the last part of their path, however many axes stacking gives them.
VECTORS = ("scale", "bias")
VIRTUAL = {"prompt", "prefix"}
STACKED = "layers/"
LAST_AXES = {True: (-2, -1), False: (-1,)}


@dataclass(frozen=True)
class Kind:
    """matrix: one parameter has the last two axes, not only the last one. stacked: the first axis counts layers."""

    matrix: bool
    stacked: bool

    @property
    def axes(self) -> tuple[int, ...]:
        """Axes of one parameter."""
        return LAST_AXES[self.matrix]


def kind_of(path: str, dimensions: int) -> Kind:
    """path: as in the model, such as `layers/0/self_attn/q_proj/kernel`. dimensions: of the array there."""
    stacked = path.startswith(STACKED)
    matrix = dimensions - stacked >= 2 and path.rsplit("/", 1)[-1] not in VECTORS
    return Kind(matrix, stacked)


def is_hidden(path: str, dimensions: int) -> bool:
    """Whether it is a matrix between hidden vectors: not the embedding table, the LM head or rows of virtual tokens."""
    outer = path.endswith("embedding") or path == "lm_head/kernel" or not VIRTUAL.isdisjoint(path.split("/"))
    return kind_of(path, dimensions).matrix and not outer


def by_path(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adapts `tx`, which works on dicts from path to array, to parameters in any tree."""

    def init(params: optax.Params) -> optax.OptState:
        return tx.init(flatten(params)[0])

    def update(
        grads: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        flat, treedef = flatten(grads)
        updates, state = tx.update(flat, state, None if params is None else flatten(params)[0])
        return treedef.unflatten([updates[path] for path in flat]), state

    return optax.GradientTransformation(init, update)
