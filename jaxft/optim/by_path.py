"""Optimizers that work by the paths of parameters."""

import jax
import optax

from jaxft.trees import flatten


def by_path(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adapts `tx`, which works on dicts from path to array, to parameters in any tree."""

    def init(params: optax.Params) -> optax.OptState:
        return tx.init(flatten(params)[0])

    def update(
        grads: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        flat, treedef = flatten(grads)
        updates, state = tx.update(flat, state, None if params is None else flatten(params)[0])
        return jax.tree.unflatten(treedef, [updates[path] for path in flat]), state

    return optax.GradientTransformation(init, update)
