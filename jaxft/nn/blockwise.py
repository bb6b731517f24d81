"""Causal attention in blocks of queries, with its own gradient: the form for CPUs and any odd shape.

No [S, S] scores outlive a block, the backward pass recomputes them from the saved log-sum-exp, and a
block looks only at the keys before its end, so half of the square is never computed. Source of the
recurrences: FlashAttention-2, arXiv:2307.08691, sections 2.3 and 3.1.
"""

# B batch, S sequence, N query heads, K kv heads, G = N / K, H head_dim, C queries of a block, T keys it sees

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Finite, so that a row with nothing to look at (padding) gives numbers and not NaN.
MASKED = -1e30
BLOCK, MOST_BLOCKS = 128, 8


class ScoreForm(NamedTuple):
    """How scores follow from q and k.

    window: at most so many tokens back, itself included. scale: what q k^T is multiplied by, 1 / sqrt(H) where
    None. softcap: scores s become softcap * tanh(s / softcap).
    """

    window: int | None = None
    scale: float | None = None
    softcap: float | None = None


PLAIN = ScoreForm()


class _Block(NamedTuple):
    start: int
    stop: int
    first_key: int


def causal_attention(
    q_BSNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BS: jax.Array,
    form: ScoreForm = PLAIN,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the tokens of the same segment that stand no later, [B, S, N, H].

    Positions must ascend by one within a segment, as they do in any row of text. The softmax is float32
    whatever the inputs are. sinks_N: for each head a score more, whose share of the softmax goes nowhere.
    """
    batch, length, heads, head_dim = q_BSNH.shape
    kv_heads = k_BSKH.shape[2]
    sinks_KG = None if sinks_N is None else sinks_N.astype(jnp.float32).reshape(kv_heads, -1)
    q_BSKGH = q_BSNH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    out_BKGSH = _attention(
        form,
        checkpoint_name(jnp.transpose(q_BSKGH, (0, 2, 3, 1, 4)), "dots"),
        checkpoint_name(jnp.transpose(k_BSKH, (0, 2, 1, 3)), "dots"),
        checkpoint_name(jnp.transpose(v_BSKH, (0, 2, 1, 3)), "dots"),
        segments_BS,
        sinks_KG,
    )
    return jnp.transpose(out_BKGSH, (0, 3, 1, 2, 4)).reshape(q_BSNH.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(form, q_BKGSH, k_BKSH, v_BKSH, segments_BS, sinks_KG):
    return _forward(form, q_BKGSH, k_BKSH, v_BKSH, segments_BS, sinks_KG)[0]


def _forward(form, q_BKGSH, k_BKSH, v_BKSH, segments_BS, sinks_KG):
    outs, sums = [], []
    for block in _blocks(q_BKGSH.shape[3], form.window):
        scores_BKGCT, _ = _scores(q_BKGSH, k_BKSH, segments_BS, block, form)
        top_BKGC1 = jnp.max(scores_BKGCT, axis=-1, keepdims=True)
        if sinks_KG is not None:
            top_BKGC1 = jnp.maximum(top_BKGC1, sinks_KG[:, :, None, None])
        weights_BKGCT = jnp.exp(scores_BKGCT - top_BKGC1)
        total_BKGC1 = jnp.sum(weights_BKGCT, axis=-1, keepdims=True)
        if sinks_KG is not None:
            total_BKGC1 += jnp.exp(sinks_KG[:, :, None, None] - top_BKGC1)
        v_BKTH = v_BKSH[:, :, block.first_key : block.stop]
        out_BKGCH = _rows(weights_BKGCT.astype(v_BKTH.dtype)) @ v_BKTH
        outs.append((out_BKGCH.reshape(*total_BKGC1.shape[:-1], -1) / total_BKGC1).astype(q_BKGSH.dtype))
        sums.append((jnp.log(total_BKGC1) + top_BKGC1)[..., 0])
    # Named, so that rematerialisation that keeps "dots" does not run this pass again.
    out_BKGSH = checkpoint_name(jnp.concatenate(outs, axis=3), "dots")
    lse_BKGS = checkpoint_name(jnp.concatenate(sums, axis=3), "dots")
    return out_BKGSH, (q_BKGSH, k_BKSH, v_BKSH, segments_BS, sinks_KG, out_BKGSH, lse_BKGS)


def _backward(form, residuals, grad_BKGSH):
    q_BKGSH, k_BKSH, v_BKSH, segments_BS, sinks_KG, out_BKGSH, lse_BKGS = residuals
    batch, kv_heads, group, length, head_dim = q_BKGSH.shape
    delta_BKGS = jnp.sum(grad_BKGSH.astype(jnp.float32) * out_BKGSH.astype(jnp.float32), axis=-1)
    # Transposed: the products below then turn only their small operand.
    dk_BKHS = jnp.zeros((batch, kv_heads, head_dim, length), jnp.float32)
    dv_BKHS = jnp.zeros((batch, kv_heads, head_dim, length), jnp.float32)
    dqs = []
    for block in _blocks(length, form.window):
        cut, seen = slice(block.start, block.stop), slice(block.first_key, block.stop)
        scores_BKGCT, slopes_BKGCT = _scores(q_BKGSH, k_BKSH, segments_BS, block, form)
        weights_BKGCT = jnp.exp(scores_BKGCT - lse_BKGS[:, :, :, cut, None])
        q_BKRH, grad_BKRH = _rows(q_BKGSH[:, :, :, cut]), _rows(grad_BKGSH[:, :, :, cut])
        dweights_BKRT = _product(grad_BKRH, jnp.swapaxes(v_BKSH[:, :, seen], 2, 3))
        dscores_BKRT = _rows(weights_BKGCT) * (dweights_BKRT - delta_BKGS[:, :, :, cut].reshape(batch, kv_heads, -1, 1))
        if slopes_BKGCT is not None:
            dscores_BKRT *= _rows(slopes_BKGCT)
        dscores_BKRT = (dscores_BKRT * score_scale(form, head_dim)).astype(q_BKGSH.dtype)
        weights_BKRT = _rows(weights_BKGCT).astype(q_BKGSH.dtype)
        dqs.append(_product(dscores_BKRT, k_BKSH[:, :, seen]).reshape(batch, kv_heads, group, -1, head_dim))
        dk_BKHS = dk_BKHS.at[..., seen].add(_product(jnp.swapaxes(q_BKRH, 2, 3), dscores_BKRT))
        dv_BKHS = dv_BKHS.at[..., seen].add(_product(jnp.swapaxes(grad_BKRH, 2, 3), weights_BKRT))
    dq_BKGSH = jnp.concatenate(dqs, axis=3).astype(q_BKGSH.dtype)
    dk_BKSH = jnp.swapaxes(dk_BKHS, 2, 3).astype(k_BKSH.dtype)
    dsinks_KG = None
    if sinks_KG is not None:
        dsinks_KG = -jnp.sum(jnp.exp(sinks_KG[:, :, None] - lse_BKGS) * delta_BKGS, axis=(0, 3))
    return dq_BKGSH, dk_BKSH, jnp.swapaxes(dv_BKHS, 2, 3).astype(v_BKSH.dtype), None, dsinks_KG


_attention.defvjp(_forward, _backward)


def _blocks(length: int, window: int | None) -> list[_Block]:
    size = max(BLOCK, -(-length // MOST_BLOCKS))
    starts = range(0, length, size)
    return [_Block(s, min(s + size, length), 0 if window is None else max(0, s - window + 1)) for s in starts]


def score_scale(form: ScoreForm, head_dim: int) -> float:
    """What q k^T is multiplied by."""
    return head_dim**-0.5 if form.scale is None else form.scale


def capped(scores: jax.Array, softcap: float | None) -> jax.Array:
    """Scores held between -softcap and softcap."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _scores(q_BKGSH, k_BKSH, segments_BS, block, form):
    """The masked scores of a block and, where they are capped, the derivative of the cap."""
    q_BKGCH = q_BKGSH[:, :, :, block.start : block.stop]
    k_BKHT = jnp.swapaxes(k_BKSH[:, :, block.first_key : block.stop], 2, 3)
    scores_BKGCT = _product(_rows(q_BKGCH), k_BKHT).reshape(*q_BKGCH.shape[:-1], -1)
    queries_C1 = jnp.arange(block.start, block.stop)[:, None]
    keys_T = jnp.arange(block.first_key, block.stop)
    mask_CT = keys_T <= queries_C1
    if form.window is not None:
        mask_CT &= keys_T > queries_C1 - form.window
    query_segments_BC1 = segments_BS[:, block.start : block.stop, None]
    mask_BCT = mask_CT & (query_segments_BC1 == segments_BS[:, None, block.first_key : block.stop])
    scores_BKGCT = capped(scores_BKGCT * score_scale(form, q_BKGSH.shape[-1]), form.softcap)
    slopes_BKGCT = None if form.softcap is None else 1.0 - jnp.square(scores_BKGCT / form.softcap)
    return jnp.where(mask_BCT[:, None, None], scores_BKGCT, MASKED), slopes_BKGCT


def _rows(x_BKGCX: jax.Array) -> jax.Array:
    return x_BKGCX.reshape(*x_BKGCX.shape[:2], -1, x_BKGCX.shape[-1])


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, preferred_element_type=jnp.float32)
