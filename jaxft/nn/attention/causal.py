"""Causal attention over whole rows: which kernel computes it, and how the ambient mesh shares it out.

Rows and heads are worked on where they are. Where the context axis splits a row, every device takes its own queries
and gathers the keys and values of the whole row, which grouped queries make small.
"""

# B batch, S sequence, T keys, C parts of a row, N query heads, K kv heads, H head_dim

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from jaxft.nn import partition
from jaxft.nn.attention import blockwise, cudnn, splash
from jaxft.nn.attention.score_form import PLAIN, ScoreForm


def causal_attention(
    q_BSNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BS: jax.Array,
    form: ScoreForm = PLAIN,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the tokens of the same segment that stand no later, [B, S, N, H].

    sinks_N: for each head a score more, whose share of the softmax goes nowhere. The splash kernel on TPUs, cuDNN's on
    GPUs, blocks in plain XLA elsewhere and for what the kernels do not take.
    """
    length, heads = q_BSNH.shape[1:3]
    k_BSKH, v_BSKH = _for_each_part(k_BSKH), _for_each_part(v_BSKH)
    shards, head_shards = partition.shards("sequence"), partition.shards("tensor")
    kernel = None
    if partition.platform() == "tpu" and splash.fits(length, shards):
        kernel = splash.kernel(
            length, length, heads, form, head_dim=q_BSNH.shape[-1], head_shards=head_shards, shards=shards
        )
    if partition.is_unsharded():
        return _part(kernel, q_BSNH, k_BSKH, v_BSKH, segments_BS, segments_BS, form, sinks_N, None)

    def part(kernel, q_BSNH, k_BSKH, v_BSKH, query_segments_BS, key_segments_BT, sinks_N):
        if shards == 1:
            return _part(kernel, q_BSNH, k_BSKH, v_BSKH, query_segments_BS, key_segments_BT, form, sinks_N, None)
        # Gathered here and not on the way in: every device gets its own part of the gradients' sum, not all of it.
        k_BTKH, v_BTKH = _whole_rows(k_BSKH), _whole_rows(v_BSKH)
        start = jax.lax.axis_index("context") * q_BSNH.shape[1]
        return _part(kernel, q_BSNH, k_BTKH, v_BTKH, query_segments_BS, key_segments_BT, form, sinks_N, start)

    specs = [
        *(_spec(x, ("batch", "sequence", "tensor", None)) for x in (q_BSNH, k_BSKH, v_BSKH)),
        _spec(segments_BS, ("batch", "sequence")),
        _spec(segments_BS, ("batch", None)),
    ]
    return jax.shard_map(
        part,
        in_specs=(_kernel_spec(kernel), *specs, None if sinks_N is None else _spec(sinks_N, ("tensor",))),
        out_specs=specs[0],
        check_vma=False,
    )(kernel, q_BSNH, k_BSKH, v_BSKH, segments_BS, segments_BS, sinks_N)


def _part(kernel, q_BSNH, k_BTKH, v_BTKH, query_segments_BS, key_segments_BT, form, sinks_N, start):
    if kernel is not None:
        return splash.attention(kernel, q_BSNH, k_BTKH, v_BTKH, query_segments_BS, key_segments_BT, form, sinks_N)
    if partition.platform() == "gpu" and cudnn.fits(q_BSNH, k_BTKH.shape[1], form, sinks_N):
        return cudnn.attention(q_BSNH, k_BTKH, v_BTKH, query_segments_BS, key_segments_BT, form, start)
    return blockwise.attention(
        q_BSNH, k_BTKH, v_BTKH, query_segments_BS, form, sinks_N, key_segments_BT=key_segments_BT, start=start
    )


@jax.custom_vjp
def _whole_rows(x_BSKH: jax.Array) -> jax.Array:
    """Gathered along the context axis, to be called under `shard_map`."""
    return jax.lax.all_gather(x_BSKH, "context", axis=1, tiled=True)


def _whole_rows_forward(x_BSKH: jax.Array) -> tuple[jax.Array, None]:
    return _whole_rows(x_BSKH), None


def _whole_rows_backward(_: None, grad_BTKH: jax.Array) -> tuple[jax.Array]:
    batch, keys, heads, head_dim = grad_BTKH.shape
    parts = jax.lax.axis_size("context")
    grad_CBSKH = grad_BTKH.reshape(batch, parts, keys // parts, heads, head_dim).swapaxes(0, 1)
    # In memory too, parts come first: of a sum that is cut along an inner dimension, TPUs send all to everyone.
    grad_CBSKH = with_layout_constraint(grad_CBSKH, Layout(major_to_minor=(0, 1, 2, 3, 4)))
    return (jax.lax.psum_scatter(grad_CBSKH, "context"),)


_whole_rows.defvjp(_whole_rows_forward, _whole_rows_backward)


def _for_each_part(x_BSKH: jax.Array) -> jax.Array:
    """Fewer kv heads than the tensor axis has devices are repeated, so that each device has the one that it needs."""
    ways, kv_heads = partition.shards("tensor"), x_BSKH.shape[2]
    return x_BSKH if kv_heads % ways == 0 else jnp.repeat(x_BSKH, ways // kv_heads, axis=2)


def _spec(x: jax.Array, dimensions: tuple[partition.Dimension | None, ...]) -> P:
    return partition.spec(x.shape, dimensions, uneven=None)


def _kernel_spec(kernel: splash.Kernel | None) -> splash.Kernel | None:
    if kernel is None:
        return None
    axes = [partition.axes_of(name) or None for name in ("tensor", "sequence")]
    return kernel.manual_sharding_spec(jax.NamedSharding(jax.sharding.get_abstract_mesh(), P(*axes)))
