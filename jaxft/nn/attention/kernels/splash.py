"""Causal attention on TPUs: the splash kernel of JAX's Pallas operations, block-sparse over packed rows.

The kernel never stores all S x T scores, skips blocks that the mask hides, and supports grouped queries, windows, soft
caps and sinks. It has its own gradient. Source: FlashAttention-2, arXiv:2307.08691, as a TPU kernel.
"""

# B batch, S queries, T keys, N query heads, K kv heads, H head_dim

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from jaxft.nn.attention.kernels.balanced import query_order
from jaxft.nn.attention.score_form import ScoreForm, score_scale

Kernel = splash.SplashAttentionKernel
LANES = 128
# Most queries and keys of a block. Larger blocks compute more of the half that the mask hides, but read keys and values
# less often, and their gradients need fewer partial sums: for 32 heads of 128 over 4,096 positions the compiler for v5e
# schedules 31 % fewer cycles for 1,024 with one kernel for all gradients than for 512 with two.
BLOCK, SMALL_BLOCK = 1024, 512
# One kernel for all gradients keeps a sum of the queries' gradient for each block of keys: too much for long rows.
MOST_PARTIAL_SUMS = 4
RESIDUAL_NAME = "attention"  # the name under which rematerialisation policies save the kernel's results


def fits(length: int, shards: int) -> bool:
    """Whether rows of `length` tokens, divided into `shards` parts, consist of whole blocks."""
    return length % (LANES * shards) == 0


def balances(length: int, shards: int, window: int | None) -> bool:
    """Whether devices that divide rows take their queries in the order of `balanced`. A window is balanced already."""
    return shards > 1 and window is None and fits(length, 2 * shards)


def kernel(
    queries: int,
    keys: int,
    heads: int,
    form: ScoreForm,
    *,
    head_dim: int,
    head_shards: int,
    shards: int,
    interpret: bool = False,
) -> Kernel:
    """The kernel for whole rows, a pytree whose leaves list the blocks to visit.

    head_shards, shards: numbers of parts into which devices divide heads and queries, in the order of `balanced` if
    `balances` says so. interpret: run without a TPU.
    """
    mask: masks.CausalMask | masks.LocalMask
    in_balance = balances(queries, shards, form.window)
    if form.window is None:
        mask = masks.CausalMask((queries, keys), shard_count=shards)
        if in_balance:
            mask.q_sequence = query_order(queries, shards)
    else:
        mask = masks.LocalMask((queries, keys), window_size=(form.window - 1, 0), offset=0, shard_count=shards)
    consecutive = queries // (2 * shards if in_balance else shards)  # no block has queries of two chunks
    sizes = block_sizes(consecutive, keys, window=form.window, head_dim=head_dim)
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=head_shards,
        q_seq_shards=shards,
        attn_logits_soft_cap=form.softcap,
        residual_checkpoint_name=RESIDUAL_NAME,
        interpret=interpret,
    )


def block_sizes(queries: int, keys: int, *, window: int | None, head_dim: int) -> splash.BlockSizes:
    """The blocks of the kernel for consecutive queries of one device and the keys of whole rows.

    Wide heads take more than one row of lanes. Their gradients leave less memory for scores, so that the queries'
    gradient has a kernel of its own, and the other kernel takes half a block at a time.
    """
    wide = head_dim > LANES
    most = SMALL_BLOCK if wide or (window is not None and window < BLOCK) else BLOCK
    rows, columns = _block(most, queries), _block(most, keys)
    one = not wide and keys // columns <= MOST_PARTIAL_SUMS
    return splash.BlockSizes(
        block_q=rows, block_kv=columns, block_kv_compute=columns,
        block_q_dkv=rows, block_kv_dkv=columns,
        block_kv_dkv_compute=_block(SMALL_BLOCK // 2, columns) if wide else columns,
        block_q_dq=None if one else rows, block_kv_dq=None if one else columns, use_fused_bwd_kernel=one,
    )  # fmt: skip


def attention(
    kernel: Kernel,
    q_BSNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    query_segments_BS: jax.Array,
    key_segments_BT: jax.Array,
    form: ScoreForm,
    sinks_N: jax.Array | None,
) -> jax.Array:
    """One device's part of the attention, [B, S, N, H] in q's dtype. `kernel` is this device's part as well."""
    head_dim = q_BSNH.shape[-1]
    # Scaled in float32: for most head sizes the factor is no power of two, so bfloat16 would round it.
    q_BSNH = (q_BSNH.astype(jnp.float32) * score_scale(form, head_dim)).astype(q_BSNH.dtype)
    q_BNSH, k_BKTH, v_BKTH = (_lanes(x).transpose(0, 2, 1, 3) for x in (q_BSNH, k_BTKH, v_BTKH))
    sinks = None if sinks_N is None else sinks_N.astype(jnp.float32)

    def attend_row(q, k, v, query_segments, key_segments):
        return kernel(q, k, v, splash.SegmentIds(query_segments, key_segments), sinks)

    out_BNSH = jax.vmap(attend_row)(q_BNSH, k_BKTH, v_BKTH, query_segments_BS, key_segments_BT)
    return out_BNSH.transpose(0, 2, 1, 3)[..., : v_BTKH.shape[-1]].astype(q_BSNH.dtype)


def _block(most: int, length: int) -> int:
    """The largest multiple of LANES up to `most` that divides length."""
    return max(size for size in range(LANES, min(most, length) + 1, LANES) if length % size == 0)


def _lanes(x: jax.Array) -> jax.Array:
    """Heads padded with zeros to whole lanes. Changes neither the scores nor the first H numbers of the result."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % LANES)])
