"""One decoder layer of any family: attention and feed-forward, each added to the residual stream."""

# B batch, S sequence, D model

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxft.nn import partition
from jaxft.nn.attention.cache import LayerCache
from jaxft.nn.attention.layer import Attention, AttentionShape, Tokens
from jaxft.nn.experts.layer import MoE, MoEShape
from jaxft.nn.experts.router_sums import RouterSums
from jaxft.nn.mlp import GatedMLP, MLPShape
from jaxft.nn.norm import NormShape, RMSNorm

NormPositions = Literal["before", "after", "around"]
# Hugging Face's names of the norms: before attention, after attention, before the feed-forward, after the feed-forward.
NORMS: dict[NormPositions, tuple[str | None, ...]] = {
    "before": ("input_layernorm", None, "post_attention_layernorm", None),
    "after": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "around": (
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """The parts of one layer. norms: the inputs and outputs of attention and feed-forward that are normalised."""

    attention: AttentionShape
    mlp: MLPShape | MoEShape
    norm: NormShape
    norms: NormPositions = "before"


class Block(nnx.Module):
    """x + after(attention(before(x))), then the same with the feed-forward."""

    def __init__(
        self, shape: BlockShape, *, stddev: float, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.norms = NORMS[shape.norms]
        for name in filter(None, self.norms):
            setattr(self, name, RMSNorm(shape.attention.width, shape.norm, dtype=dtype, param_dtype=param_dtype))
        self.self_attn = Attention(
            shape.attention, shape.norm, stddev=stddev, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.mlp: GatedMLP | MoE
        if isinstance(shape.mlp, MoEShape):
            self.mlp = MoE(shape.mlp, stddev=stddev, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        else:
            self.mlp = GatedMLP(shape.mlp, stddev=stddev, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self,
        x_BSD: jax.Array,
        tokens: Tokens,
        cache: LayerCache | None,
        layer: jax.Array,
        key: jax.Array | None,
        routing: RouterSums | None = None,
    ) -> tuple[jax.Array, LayerCache | None, RouterSums | None]:
        """(the residual stream, the cache including these tokens, `routing` including this layer's tokens).

        layer: this layer's index in its stack. key: turns dropout on. routing: None if no loss reads the sums.
        """
        keys = None if key is None else jax.random.split(key, 7)
        attention_keys, mlp_keys = (None, None) if keys is None else (keys[:4], keys[4:])
        attended_BSD, cache = self.self_attn(_whole(self._norm(0, x_BSD)), tokens, cache, layer, attention_keys)
        x_BSD = checkpoint_name(x_BSD + self._norm(1, _stream(attended_BSD)), "dots")
        input_BSD = self._norm(2, x_BSD)
        if not isinstance(self.mlp, MoE):
            output_BSD = _stream(self.mlp(_whole(input_BSD), mlp_keys))
        elif routing is None:
            output_BSD = self.mlp(input_BSD)
        else:
            output_BSD, routing = self.mlp.with_router_sums(input_BSD, tokens.segments_BS, routing)
        return x_BSD + self._norm(3, output_BSD), cache, routing

    def _norm(self, position: int, x_BSD: jax.Array) -> jax.Array:
        name = self.norms[position]
        return x_BSD if name is None else getattr(self, name)(x_BSD)


STREAM: partition.Dimensions = ("batch", "stream", None)
WHOLE: partition.Dimensions = ("batch", "sequence", None)


def _whole(x_BSD: jax.Array) -> jax.Array:
    """All positions of a device's rows, for matrices that the tensor axis splits."""
    return partition.gather(x_BSD, STREAM, WHOLE)


def _stream(x_BSD: jax.Array) -> jax.Array:
    return partition.reduce_scatter(x_BSD, STREAM, WHOLE)
