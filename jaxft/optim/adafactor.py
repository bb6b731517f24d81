"""Adafactor (arXiv:1804.04235): of a matrix's second moment only the means of rows and of columns are kept."""

# I, O rows and columns of a matrix

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft.optim.parameters import Kind, kind_of

DECAY = 0.8  # the moments of step t weigh what was before by 1 - t^-0.8 (section 7.2)
LARGEST = 1.0  # root mean square of an update (section 6)
TINY, LEAST_SCALE = 1e-30, 1e-3  # the paper's epsilon 1 and 2


class AdafactorState(NamedTuple):
    """count: int32, updates made. moments: by path, `row` [..., I] and `col` [..., O] of a matrix, else an array."""

    count: jax.Array
    moments: dict[str, Any]


def scale_by_factors(*, scale_parameter: bool) -> optax.GradientTransformation:
    """Adafactor's direction without its own step sizes, momentum or decay; on dicts from path to array.

    scale_parameter: whether updates are multiplied by the root mean square of their parameter, at least 1e-3.
    Every layer of a stack has its own factors, clipping and scale.
    """

    def init(params: dict[str, jax.Array]) -> AdafactorState:
        def zeros(path: str, x: jax.Array) -> Any:
            if not kind_of(path, x.ndim).matrix:
                return jnp.zeros_like(x)
            return {"row": jnp.zeros(x.shape[:-1], x.dtype), "col": jnp.zeros((*x.shape[:-2], x.shape[-1]), x.dtype)}

        return AdafactorState(jnp.int32(0), {path: zeros(path, x) for path, x in params.items()})

    def update(
        grads: dict[str, jax.Array], state: AdafactorState, params: dict[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], AdafactorState]:
        decay = 1 - (state.count + 1.0) ** -DECAY
        updates, moments = {}, {}
        for path, grad in grads.items():
            kind = kind_of(path, grad.ndim)
            moments[path] = _moved(state.moments[path], grad**2 + TINY, decay)
            direction = grad * _inverse_root(moments[path])
            direction /= jnp.maximum(1.0, _rms(direction, kind) / LARGEST)
            if scale_parameter:
                direction *= jnp.maximum(LEAST_SCALE, _rms(params[path], kind))
            updates[path] = direction
        return updates, AdafactorState(state.count + 1, moments)

    return optax.GradientTransformation(init, update)


def _moved(moment: Any, squares: jax.Array, decay: jax.Array) -> Any:
    now = {"row": jnp.mean(squares, -1), "col": jnp.mean(squares, -2)} if isinstance(moment, dict) else squares
    return jax.tree.map(lambda before, x: decay * before + (1 - decay) * x, moment, now)


def _inverse_root(moment: Any) -> jax.Array:
    if not isinstance(moment, dict):
        return jax.lax.rsqrt(moment)
    row, col = moment["row"], moment["col"]
    row = row / jnp.mean(row, -1, keepdims=True)
    return jax.lax.rsqrt(row)[..., None] * jax.lax.rsqrt(col)[..., None, :]


def _rms(x: jax.Array, kind: Kind) -> jax.Array:
    return jnp.sqrt(jnp.mean(x**2, axis=kind.axes, keepdims=True))
