"""Selective state spaces with scalar decay, SSD (arXiv:2405.21060), over whole rows in chunks and for single tokens.

A head's state S [P, N] fades by e^(dt A) with each token and takes in dt x B^T; the output is S C. Within a chunk all
outputs are products of matrices, as in attention, so that a row takes as many steps as it has chunks.
"""

# B batch, S sequence, C positions of a chunk (D a second time), G groups, R heads of a group, P head size, N state size

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxft.nn.recurrent.chunks import chunk_size, fading, in_chunks

CHUNK = 256


class StateSpaceInputs(NamedTuple):
    """What the recurrence reads, float32. x_BSGRP: the heads' inputs, times dt. decay_BSGR: dt A. b_BSGN, c_BSGN: how
    the state is written and read, shared by the heads of a group.

    At padding decay and inputs are 0, which leaves the state unchanged.
    """

    x_BSGRP: jax.Array
    decay_BSGR: jax.Array
    b_BSGN: jax.Array
    c_BSGN: jax.Array


def state_space(
    inputs: StateSpaceInputs, documents_BS: jax.Array, state_BGRPN: jax.Array, *, precision: str = "highest"
) -> tuple[jax.Array, jax.Array]:
    """(the outputs [B, S, G, R, P] float32, the state after the last position).

    documents_BS: the number of each position's document, ascending; padding that follows a document has its number.
    state_BGRPN: the state before the first position, of its document. precision: of the matrix products.
    """
    length = documents_BS.shape[1]
    size = chunk_size(length, CHUNK)
    chunks = jax.tree.map(lambda x: in_chunks(x, size), inputs)
    documents_NBC = in_chunks(documents_BS, size, mode="edge")
    step = jax.checkpoint(functools.partial(_chunk, precision=precision), prevent_cse=False)
    (state_BGRPN, _), y_NBCGRP = jax.lax.scan(step, (state_BGRPN, documents_BS[:, 0]), (chunks, documents_NBC))
    y_BSGRP = jnp.moveaxis(y_NBCGRP, 0, 1).reshape(len(documents_BS), -1, *y_NBCGRP.shape[3:])
    return y_BSGRP[:, :length], state_BGRPN


def state_space_step(inputs: StateSpaceInputs, state_BGRPN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`state_space` for one position, [B, 1, G, R, P], without chunks."""
    x_BGRP, decay_BGR, b_BGN, c_BGN = (x[:, 0] for x in inputs)
    state_BGRPN = state_BGRPN * jnp.exp(decay_BGR)[..., None, None]
    state_BGRPN = state_BGRPN + x_BGRP[..., None] * b_BGN[:, :, None, None]
    return jnp.einsum("BGRPN,BGN->BGRP", state_BGRPN, c_BGN, precision="highest")[:, None], state_BGRPN


def _chunk(
    carry: tuple[jax.Array, jax.Array], scanned: tuple[StateSpaceInputs, jax.Array], *, precision: str
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """The outputs of one chunk. carry: the state before it, and the document that the state is of."""
    (state_BGRPN, owner_B), (inputs, documents_BC) = carry, scanned
    product = functools.partial(jnp.einsum, precision=precision)
    fade = fading(inputs.decay_BSGR, documents_BC, owner_B)
    seen_BGCD = product("BCGN,BDGN->BGCD", inputs.c_BSGN, inputs.b_BSGN)
    y_BGRCP = product("BGRCD,BDGRP->BGRCP", seen_BGCD[:, :, None] * fade.within_BHRCD, inputs.x_BSGRP)
    y_BGRCP += fade.reads_BHRC[..., None] * product("BCGN,BGRPN->BGRCP", inputs.c_BSGN, state_BGRPN)
    left_BDGRP = inputs.x_BSGRP * jnp.moveaxis(fade.stays_BHRC, -1, 1)[..., None]
    added_BGRPN = product("BDGRP,BDGN->BGRPN", left_BDGRP, inputs.b_BSGN)
    state_BGRPN = fade.keeps_BHR[..., None, None] * state_BGRPN + added_BGRPN
    return (state_BGRPN, fade.last_B), jnp.moveaxis(y_BGRCP, 3, 1)
