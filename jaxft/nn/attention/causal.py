"""Causal attention over whole rows: chooses the kernel and divides the work over the ambient mesh.

Every device works on its own rows and heads. If the context axis splits rows, every device has its own queries and
gathers the keys and values of the whole row, which grouped queries make small. The kernel for TPUs skips what causal
order hides, so there the devices exchange queries first, until all have as much to do.
"""

# B batch, S sequence, T keys, C parts of a row, N query heads, K kv heads, H head_dim

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from jaxft.nn import partition
from jaxft.nn.attention.kernels import balanced, blockwise, cudnn, mosaic, splash
from jaxft.nn.attention.score_form import PLAIN, ScoreForm


def causal_attention(
    q_BSNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BS: jax.Array,
    form: ScoreForm = PLAIN,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the tokens of the same segment up to each query, [B, S, N, H].

    sinks_N: an additional score for each head, whose share of the softmax is discarded. TPUs use the splash kernel,
    GPUs those of tokamax or that of cuDNN; other devices, and cases that the kernels do not support, use blocks in
    plain XLA.
    """
    length, heads = q_BSNH.shape[1:3]
    k_BSKH, v_BSKH = _repeat_heads(k_BSKH), _repeat_heads(v_BSKH)
    shards, head_shards = partition.shards("sequence"), partition.shards("tensor")
    kernel = None
    if partition.platform() == "tpu" and splash.fits(length, shards):
        kernel = splash.kernel(
            length, length, heads, form, head_dim=q_BSNH.shape[-1], head_shards=head_shards, shards=shards
        )
    if partition.is_unsharded():
        return _attend(kernel, q_BSNH, k_BSKH, v_BSKH, segments_BS, segments_BS, form, sinks_N, None)

    def local(kernel, q_BSNH, k_BSKH, v_BSKH, query_segments_BS, key_segments_BT, sinks_N):
        if shards == 1:
            return _attend(kernel, q_BSNH, k_BSKH, v_BSKH, query_segments_BS, key_segments_BT, form, sinks_N, None)
        # Gathered here and not by in_specs, so that every device receives only its own part of the summed gradient.
        k_BTKH, v_BTKH = _whole_rows(k_BSKH), _whole_rows(v_BSKH)
        if kernel is not None and splash.balances(length, shards, form.window):
            own_segments_BS = balanced.own_columns(key_segments_BT)
            own_BSNH = balanced.take_queries(q_BSNH)
            with jax.named_scope(balanced.SCOPE):
                out_BSNH = splash.attention(
                    kernel, own_BSNH, k_BTKH, v_BTKH, own_segments_BS, key_segments_BT, form, sinks_N
                )
            return balanced.return_results(out_BSNH)
        start = jax.lax.axis_index("context") * q_BSNH.shape[1]
        return _attend(kernel, q_BSNH, k_BTKH, v_BTKH, query_segments_BS, key_segments_BT, form, sinks_N, start)

    specs = [
        *(_spec(x, ("batch", "sequence", "tensor", None)) for x in (q_BSNH, k_BSKH, v_BSKH)),
        _spec(segments_BS, ("batch", "sequence")),
        _spec(segments_BS, ("batch", None)),
    ]
    return jax.shard_map(
        local,
        in_specs=(_kernel_spec(kernel), *specs, None if sinks_N is None else _spec(sinks_N, ("tensor",))),
        out_specs=specs[0],
        check_vma=False,
    )(kernel, q_BSNH, k_BSKH, v_BSKH, segments_BS, segments_BS, sinks_N)


def _attend(
    kernel: splash.Kernel | None,
    q_BSNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    query_segments_BS: jax.Array,
    key_segments_BT: jax.Array,
    form: ScoreForm,
    sinks_N: jax.Array | None,
    start: jax.Array | None,
) -> jax.Array:
    """One device's part of the attention. start: position of its first query in the row; None for whole rows."""
    if kernel is not None:
        return splash.attention(kernel, q_BSNH, k_BTKH, v_BTKH, query_segments_BS, key_segments_BT, form, sinks_N)
    keys, value_dim = k_BTKH.shape[1], v_BTKH.shape[-1]
    if partition.platform() == "gpu" and mosaic.fits(q_BSNH, keys, sinks_N, value_dim=value_dim):
        return mosaic.attention(q_BSNH, k_BTKH, v_BTKH, key_segments_BT, form, start)
    if partition.platform() == "gpu" and cudnn.fits(q_BSNH, keys, form, sinks_N, value_dim=value_dim):
        return cudnn.attention(q_BSNH, k_BTKH, v_BTKH, query_segments_BS, key_segments_BT, form, start)
    return blockwise.attention(
        q_BSNH, k_BTKH, v_BTKH, query_segments_BS, form, sinks_N, key_segments_BT=key_segments_BT, start=start
    )


@jax.custom_vjp
def _whole_rows(x_BSKH: jax.Array) -> jax.Array:
    """x of whole rows, gathered along the context axis. For use under `shard_map`."""
    return jax.lax.all_gather(x_BSKH, "context", axis=1, tiled=True)


def _whole_rows_forward(x_BSKH: jax.Array) -> tuple[jax.Array, None]:
    return _whole_rows(x_BSKH), None


def _whole_rows_backward(_: None, grad_BTKH: jax.Array) -> tuple[jax.Array]:
    batch, keys, heads, head_dim = grad_BTKH.shape
    parts = jax.lax.axis_size("context")
    grad_CBSKH = grad_BTKH.reshape(batch, parts, keys // parts, heads, head_dim).swapaxes(0, 1)
    # Parts come first in memory too: TPUs send a whole sum to every device if it is split along an inner dimension.
    grad_CBSKH = with_layout_constraint(grad_CBSKH, Layout(major_to_minor=(0, 1, 2, 3, 4)))
    return (jax.lax.psum_scatter(grad_CBSKH, "context"),)


_whole_rows.defvjp(_whole_rows_forward, _whole_rows_backward)


def _repeat_heads(x_BSKH: jax.Array) -> jax.Array:
    """Repeats kv heads if there are fewer of them than devices on the tensor axis, so that each device has the one it
    needs.
    """
    ways, kv_heads = partition.shards("tensor"), x_BSKH.shape[2]
    return x_BSKH if kv_heads % ways == 0 else jnp.repeat(x_BSKH, ways // kv_heads, axis=2)


def _spec(x: jax.Array, dimensions: partition.Dimensions) -> P:
    return partition.spec(x.shape, dimensions, uneven=None)


def _kernel_spec(kernel: splash.Kernel | None) -> splash.Kernel | None:
    if kernel is None:
        return None
    axes = [partition.axes_of(name) or None for name in ("tensor", "sequence")]
    return kernel.manual_sharding_spec(jax.NamedSharding(jax.sharding.get_abstract_mesh(), P(*axes)))
