"""The gated delta rule (arXiv:2412.06464), over whole rows in chunks (arXiv:2406.06484) and for single tokens.

A head's state S [K, V] maps keys to values. Each token lets it fade by e^g and then corrects what it holds for the
token's key: S <- e^g S; S <- S + k (beta (v - k^T S))^T; its output is S^T q. Within a chunk of C positions all
corrections follow from one triangular system, so that a row takes S / C steps of matrix products.
"""

# B batch, S sequence, N chunks, C positions of a chunk, H key heads, R value heads of a key head, K key size,
# V value size

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxft.nn.recurrent.chunks import chunk_size, fading, in_chunks

CHUNK = 128  # the width of a TPU's matrix unit


class DeltaInputs(NamedTuple):
    """What the rule reads, float32. q_BSHK, k_BSHK: of length 1 (q times K^-0.5). v_BSHRV. decay_BSHR: g, at most 0.
    rate_BSHR: beta.

    At padding g and beta are 0, which leaves the state unchanged.
    """

    q_BSHK: jax.Array
    k_BSHK: jax.Array
    v_BSHRV: jax.Array
    decay_BSHR: jax.Array
    rate_BSHR: jax.Array


def delta_rule(
    inputs: DeltaInputs, documents_BS: jax.Array, state_BHRKV: jax.Array, *, precision: str = "highest"
) -> tuple[jax.Array, jax.Array]:
    """(the outputs [B, S, H, R, V] float32, the state after the last position).

    documents_BS: the number of each position's document, ascending; padding that follows a document has its number.
    state_BHRKV: the state before the first position, of its document. precision: of the matrix products but those of
    the inverse, which needs more: rounded to bfloat16 it is wrong in the second digit if keys are alike.
    """
    length = inputs.q_BSHK.shape[1]
    size = chunk_size(length, CHUNK)
    chunks = jax.tree.map(lambda x: in_chunks(x, size), inputs)
    documents_NBC = in_chunks(documents_BS, size, mode="edge")
    step = jax.checkpoint(functools.partial(_chunk, precision=precision), prevent_cse=False)
    (state_BHRKV, _), y_NBCHRV = jax.lax.scan(step, (state_BHRKV, documents_BS[:, 0]), (chunks, documents_NBC))
    y_BSHRV = jnp.moveaxis(y_NBCHRV, 0, 1).reshape(len(documents_BS), -1, *y_NBCHRV.shape[3:])
    return y_BSHRV[:, :length], state_BHRKV


def delta_step(inputs: DeltaInputs, state_BHRKV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`delta_rule` for one position, [B, 1, H, R, V], without chunks."""
    q_BHK, k_BHK, v_BHRV, decay_BHR, rate_BHR = (x[:, 0] for x in inputs)
    state_BHRKV = state_BHRKV * jnp.exp(decay_BHR)[..., None, None]
    known_BHRV = jnp.einsum("BHK,BHRKV->BHRV", k_BHK, state_BHRKV, precision="highest")
    change_BHRV = rate_BHR[..., None] * (v_BHRV - known_BHRV)
    state_BHRKV = state_BHRKV + k_BHK[:, :, None, :, None] * change_BHRV[..., None, :]
    y_BHRV = jnp.einsum("BHK,BHRKV->BHRV", q_BHK, state_BHRKV, precision="highest")
    return y_BHRV[:, None], state_BHRKV


def _chunk(
    carry: tuple[jax.Array, jax.Array], scanned: tuple[DeltaInputs, jax.Array], *, precision: str
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """The outputs of one chunk. carry: the state before it, and the document that the state is of."""
    (state_BHRKV, owner_B), (inputs, documents_BC) = carry, scanned
    product = functools.partial(jnp.einsum, precision=precision)
    rate_BHRC = jnp.moveaxis(inputs.rate_BSHR, 1, -1)
    fade = fading(inputs.decay_BSHR, documents_BC, owner_B)

    alike_BHCD = product("BCHK,BDHK->BHCD", inputs.k_BSHK, inputs.k_BSHK)
    below = jnp.tri(documents_BC.shape[1], k=-1, dtype=bool)
    system_BHRCD = jnp.where(below, rate_BHRC[..., None] * alike_BHCD[:, :, None] * fade.within_BHRCD, 0)
    known_BHRCV = fade.reads_BHRC[..., None] * product("BCHK,BHRKV->BHRCV", inputs.k_BSHK, state_BHRKV)
    wanted_BHRCV = rate_BHRC[..., None] * (jnp.moveaxis(inputs.v_BSHRV, 1, 3) - known_BHRCV)
    change_BHRCV = product("BHRCD,BHRDV->BHRCV", unit_inverse(system_BHRCD), wanted_BHRCV)

    seen_BHCD = product("BCHK,BDHK->BHCD", inputs.q_BSHK, inputs.k_BSHK)
    y_BHRCV = fade.reads_BHRC[..., None] * product("BCHK,BHRKV->BHRCV", inputs.q_BSHK, state_BHRKV)
    y_BHRCV += product("BHRCD,BHRDV->BHRCV", seen_BHCD[:, :, None] * fade.within_BHRCD, change_BHRCV)
    added_BHRKV = product("BCHK,BHRCV->BHRKV", inputs.k_BSHK, fade.stays_BHRC[..., None] * change_BHRCV)
    state_BHRKV = fade.keeps_BHR[..., None, None] * state_BHRKV + added_BHRKV
    return (state_BHRKV, fade.last_B), jnp.moveaxis(y_BHRCV, 3, 1)


def unit_inverse(system: jax.Array) -> jax.Array:
    """(I + system)^-1 for matrices [..., C, C] that are strictly lower triangular; C is a power of two.

    Blocks on the diagonal are inverted, first of size 1; then pairs of neighbouring blocks are joined, until one is
    left: [[P, 0], [Q, R]]^-1 = [[P^-1, 0], [-R^-1 Q P^-1, R^-1]]. It is as stable as forward substitution.
    """
    size = system.shape[-1]
    rows, columns = jnp.arange(size)[:, None], jnp.arange(size)[None]
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=system.dtype), system.shape)
    block = 1
    while block < size:
        joined = (rows // (2 * block) == columns // (2 * block)) & (rows // block > columns // block)
        lower = jnp.where(joined, system, 0)
        inverse = inverse - _product(_product(inverse, lower), inverse)
        block *= 2
    return inverse


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision="high")
