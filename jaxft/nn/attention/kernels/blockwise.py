"""Causal attention in blocks of queries, with its own gradient: for CPUs, and for shapes that no kernel supports.

Scores exist only within a block; the backward pass recomputes them from the saved log-sum-exp. A block computes only
the scores of keys before its end, so half of all S x S scores are never computed. Source of the recurrences:
FlashAttention-2, arXiv:2307.08691, sections 2.3 and 3.1.
"""

# B batch, S sequence, N query heads, K kv heads, G = N / K, H head_dim, C queries of a block, T keys it sees

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxft.nn.attention.score_form import MASKED, PLAIN, ScoreForm, cap_scores, score_scale

BLOCK, MOST_BLOCKS = 128, 8


class _Block(NamedTuple):
    """The queries from start to stop, and the range of keys that any of them may see."""

    start: int
    stop: int
    first_key: int
    last_key: int


def attention(
    q_BSNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BS: jax.Array,
    form: ScoreForm = PLAIN,
    sinks_N: jax.Array | None = None,
    *,
    key_segments_BT: jax.Array | None = None,
    start: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the tokens of the same segment up to each query, [B, S, N, H].

    Positions must ascend by one within a segment, as they do in any row of text. The softmax is float32, independently
    of the type of the inputs. Values may have another size than keys, which the result then has. sinks_N: an additional
    score for each head, whose share of the softmax is discarded. key_segments_BT, start: the segments of the whole row,
    and the position of the first query in it; None if the queries are the whole row.
    """
    part = _Part(segments_BS, segments_BS if key_segments_BT is None else key_segments_BT, start)
    batch, length, heads, head_dim = q_BSNH.shape
    kv_heads = k_BTKH.shape[2]
    sinks_KG = None if sinks_N is None else sinks_N.astype(jnp.float32).reshape(kv_heads, -1)
    q_BSKGH = q_BSNH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    out_BKGSH = _attention(
        form,
        jnp.transpose(q_BSKGH, (0, 2, 3, 1, 4)),
        jnp.transpose(k_BTKH, (0, 2, 1, 3)),
        jnp.transpose(v_BTKH, (0, 2, 1, 3)),
        part,
        sinks_KG,
    )
    return jnp.transpose(out_BKGSH, (0, 3, 1, 2, 4)).reshape(*q_BSNH.shape[:3], v_BTKH.shape[-1])


class _Part(NamedTuple):
    """The part of the row with the queries. start: position of the first query; None if they are the whole row."""

    segments_BS: jax.Array
    key_segments_BT: jax.Array
    start: jax.Array | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    form: ScoreForm,
    q_BKGSH: jax.Array,
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    part: _Part,
    sinks_KG: jax.Array | None,
) -> jax.Array:
    return _forward(form, q_BKGSH, k_BKTH, v_BKTH, part, sinks_KG)[0]


def _forward(form, q_BKGSH, k_BKTH, v_BKTH, part, sinks_KG):
    outs, sums = [], []
    for block in _blocks(part, form.window):
        scores_BKGCT, _ = _scores(q_BKGSH, k_BKTH, part, block, form)
        top_BKGC1 = jnp.max(scores_BKGCT, axis=-1, keepdims=True)
        if sinks_KG is not None:
            top_BKGC1 = jnp.maximum(top_BKGC1, sinks_KG[:, :, None, None])
        weights_BKGCT = jnp.exp(scores_BKGCT - top_BKGC1)
        total_BKGC1 = jnp.sum(weights_BKGCT, axis=-1, keepdims=True)
        if sinks_KG is not None:
            total_BKGC1 += jnp.exp(sinks_KG[:, :, None, None] - top_BKGC1)
        seen_BKTH = v_BKTH[:, :, block.first_key : block.last_key]
        out_BKGCH = _rows(weights_BKGCT.astype(seen_BKTH.dtype)) @ seen_BKTH
        outs.append((out_BKGCH.reshape(*total_BKGC1.shape[:-1], -1) / total_BKGC1).astype(q_BKGSH.dtype))
        sums.append((jnp.log(total_BKGC1) + top_BKGC1)[..., 0])
    # Named, so that rematerialisation policies that save these do not run this pass again.
    out_BKGSH = checkpoint_name(jnp.concatenate(outs, axis=3), "attention")
    lse_BKGS = checkpoint_name(jnp.concatenate(sums, axis=3), "attention")
    return out_BKGSH, (q_BKGSH, k_BKTH, v_BKTH, part, sinks_KG, out_BKGSH, lse_BKGS)


def _backward(form, residuals, grad_BKGSH):
    q_BKGSH, k_BKTH, v_BKTH, part, sinks_KG, out_BKGSH, lse_BKGS = residuals
    (batch, kv_heads, group, _, head_dim), keys = q_BKGSH.shape, k_BKTH.shape[2]
    delta_BKGS = jnp.sum(grad_BKGSH.astype(jnp.float32) * out_BKGSH.astype(jnp.float32), axis=-1)
    # Transposed, so that the products below transpose only their smaller operand.
    dk_BKHT = jnp.zeros((batch, kv_heads, head_dim, keys), jnp.float32)
    dv_BKHT = jnp.zeros((batch, kv_heads, v_BKTH.shape[-1], keys), jnp.float32)
    dqs = []
    for block in _blocks(part, form.window):
        cut, seen = slice(block.start, block.stop), slice(block.first_key, block.last_key)
        scores_BKGCT, slopes_BKGCT = _scores(q_BKGSH, k_BKTH, part, block, form)
        weights_BKGCT = jnp.exp(scores_BKGCT - lse_BKGS[:, :, :, cut, None])
        q_BKRH, grad_BKRH = _rows(q_BKGSH[:, :, :, cut]), _rows(grad_BKGSH[:, :, :, cut])
        dweights_BKRT = _product(grad_BKRH, jnp.swapaxes(v_BKTH[:, :, seen], 2, 3))
        dscores_BKRT = _rows(weights_BKGCT) * (dweights_BKRT - delta_BKGS[:, :, :, cut].reshape(batch, kv_heads, -1, 1))
        if slopes_BKGCT is not None:
            dscores_BKRT *= _rows(slopes_BKGCT)
        dscores_BKRT = (dscores_BKRT * score_scale(form, head_dim)).astype(q_BKGSH.dtype)
        weights_BKRT = _rows(weights_BKGCT).astype(q_BKGSH.dtype)
        dqs.append(_product(dscores_BKRT, k_BKTH[:, :, seen]).reshape(batch, kv_heads, group, -1, head_dim))
        dk_BKHT = dk_BKHT.at[..., seen].add(_product(jnp.swapaxes(q_BKRH, 2, 3), dscores_BKRT))
        dv_BKHT = dv_BKHT.at[..., seen].add(_product(jnp.swapaxes(grad_BKRH, 2, 3), weights_BKRT))
    dq_BKGSH = jnp.concatenate(dqs, axis=3).astype(q_BKGSH.dtype)
    dk_BKTH = jnp.swapaxes(dk_BKHT, 2, 3).astype(k_BKTH.dtype)
    dv_BKTH = jnp.swapaxes(dv_BKHT, 2, 3).astype(v_BKTH.dtype)
    dsinks_KG = None
    if sinks_KG is not None:
        dsinks_KG = -jnp.sum(jnp.exp(sinks_KG[:, :, None] - lse_BKGS) * delta_BKGS, axis=(0, 3))
    return dq_BKGSH, dk_BKTH, dv_BKTH, None, dsinks_KG


_attention.defvjp(_forward, _backward)


def _blocks(part: _Part, window: int | None) -> list[_Block]:
    queries, keys = part.segments_BS.shape[1], part.key_segments_BT.shape[1]
    size = max(BLOCK, -(-queries // MOST_BLOCKS))
    blocks = [(first, min(first + size, queries)) for first in range(0, queries, size)]
    if part.start is not None:
        # The start is known only on the device, so these queries may see any key.
        return [_Block(first, stop, 0, keys) for first, stop in blocks]
    return [_Block(first, stop, 0 if window is None else max(0, first - window + 1), stop) for first, stop in blocks]


def _scores(
    q_BKGSH: jax.Array, k_BKTH: jax.Array, part: _Part, block: _Block, form: ScoreForm
) -> tuple[jax.Array, jax.Array | None]:
    """The masked scores of a block and, if they are capped, the derivative of the cap."""
    q_BKGCH = q_BKGSH[:, :, :, block.start : block.stop]
    k_BKHT = jnp.swapaxes(k_BKTH[:, :, block.first_key : block.last_key], 2, 3)
    scores_BKGCT = _product(_rows(q_BKGCH), k_BKHT).reshape(*q_BKGCH.shape[:-1], -1)
    queries_C1 = (jnp.arange(block.start, block.stop) + (0 if part.start is None else part.start))[:, None]
    keys_T = jnp.arange(block.first_key, block.last_key)
    mask_CT = keys_T <= queries_C1
    if form.window is not None:
        mask_CT &= keys_T > queries_C1 - form.window
    query_segments_BC1 = part.segments_BS[:, block.start : block.stop, None]
    mask_BCT = mask_CT & (query_segments_BC1 == part.key_segments_BT[:, None, block.first_key : block.last_key])
    scores_BKGCT = cap_scores(scores_BKGCT * score_scale(form, q_BKGSH.shape[-1]), form.softcap)
    slopes_BKGCT = None if form.softcap is None else 1.0 - jnp.square(scores_BKGCT / form.softcap)
    return jnp.where(mask_BCT[:, None, None], scores_BKGCT, MASKED), slopes_BKGCT


def _rows(x_BKGCX: jax.Array) -> jax.Array:
    return x_BKGCX.reshape(*x_BKGCX.shape[:2], -1, x_BKGCX.shape[-1])


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, preferred_element_type=jnp.float32)
