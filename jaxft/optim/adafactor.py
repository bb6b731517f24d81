"""Adafactor (arXiv:1804.04235): stores only the row and column means of a matrix's second moment."""

# I, O rows and columns of a matrix

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft.nn.param_kind import ParamKind, kind_of

DECAY = 0.8  # at step t, earlier moments have the weight 1 - t^-0.8 (section 7.2)
LARGEST = 1.0  # the largest root mean square of an update (section 6)
TINY, LEAST_SCALE = 1e-30, 1e-3  # the paper's epsilon 1 and 2
# Of a matrix its row and column means, of a vector the moment itself.
Moment = jax.Array | dict[str, jax.Array]


class AdafactorState(NamedTuple):
    """steps: int32, number of updates so far. moments: by path, `row` [..., I] and `col` [..., O] for a matrix, else an
    array of the parameter's shape.
    """

    steps: jax.Array
    moments: dict[str, Moment]


def scale_by_factors(*, scale_parameter: bool) -> optax.GradientTransformation:
    """Adafactor's direction, without its own step sizes, momentum or decay; for dicts from path to array.

    scale_parameter: multiply updates by the root mean square of their parameter, at least 1e-3. Every layer of a stack
    has its own factors, clipping and scale.
    """

    def init(params: dict[str, jax.Array]) -> AdafactorState:
        def zeros(path: str, x: jax.Array) -> Moment:
            if not kind_of(path, x.ndim).matrix:
                return jnp.zeros_like(x)
            return {"row": jnp.zeros(x.shape[:-1], x.dtype), "col": jnp.zeros((*x.shape[:-2], x.shape[-1]), x.dtype)}

        return AdafactorState(jnp.int32(0), {path: zeros(path, x) for path, x in params.items()})

    def update(
        grads: dict[str, jax.Array], state: AdafactorState, params: dict[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], AdafactorState]:
        decay = 1 - (state.steps + 1.0) ** -DECAY
        updates: dict[str, jax.Array] = {}
        moments: dict[str, Moment] = {}
        for path, grad in grads.items():
            kind = kind_of(path, grad.ndim)
            moments[path] = _update_moment(state.moments[path], grad**2 + TINY, decay)
            direction = grad * _inverse_root(moments[path])
            direction /= jnp.maximum(1.0, _rms(direction, kind) / LARGEST)
            if scale_parameter:
                direction *= jnp.maximum(LEAST_SCALE, _rms(params[path], kind))
            updates[path] = direction
        return updates, AdafactorState(state.steps + 1, moments)

    return optax.GradientTransformation(init, update)


def _update_moment(moment: Moment, squares: jax.Array, decay: jax.Array) -> Moment:
    current = {"row": jnp.mean(squares, -1), "col": jnp.mean(squares, -2)} if isinstance(moment, dict) else squares
    return jax.tree.map(lambda before, x: decay * before + (1 - decay) * x, moment, current)


def _inverse_root(moment: Moment) -> jax.Array:
    if not isinstance(moment, dict):
        return jax.lax.rsqrt(moment)
    row, col = moment["row"], moment["col"]
    row = row / jnp.mean(row, -1, keepdims=True)
    return jax.lax.rsqrt(row)[..., None] * jax.lax.rsqrt(col)[..., None, :]


def _rms(x: jax.Array, kind: ParamKind) -> jax.Array:
    return jnp.sqrt(jnp.mean(x**2, axis=kind.axes, keepdims=True))
