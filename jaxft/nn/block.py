"""One decoder layer of any family: a mixer of positions and a feed-forward, each added to the residual stream."""

# B batch, S sequence, D model

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxft.nn.attention.borrowed import BorrowedAttention, BorrowedShape
from jaxft.nn.attention.cache import MixerCache, NewKeys
from jaxft.nn.attention.latent import LatentAttention, LatentShape
from jaxft.nn.attention.layer import Attention, Kept, Tokens
from jaxft.nn.attention.shape import AttentionShape
from jaxft.nn.experts.layer import MoE, MoEShape
from jaxft.nn.experts.router_sums import RouterSums
from jaxft.nn.linear import Linear
from jaxft.nn.mlp import MLP, MLPShape
from jaxft.nn.norm import Norm, NormShape
from jaxft.nn.param_kind import Constant
from jaxft.nn.partition import split, stream, whole
from jaxft.nn.recurrent.delta_net import DeltaNet, DeltaNetShape
from jaxft.nn.recurrent.mamba import Mamba2, Mamba2Shape
from jaxft.nn.recurrent.short_conv import ShortConv, ShortConvShape
from jaxft.nn.residual.altup import AltUp, AltUpShape
from jaxft.nn.residual.laurel import Laurel
from jaxft.nn.storage import StorageDims

# Hugging Face's names of the norms: before and after the mixer, before and after the feed-forward; None for no norm.
NormNames = tuple[str | None, str | None, str | None, str | None]
BEFORE: NormNames = ("input_layernorm", None, "post_attention_layernorm", None)
AFTER: NormNames = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
AROUND: NormNames = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)  # fmt: skip
# Likewise, where experts are beside the feed-forward: after that, before the experts, after the experts.
EXPERT_NORMS = ("post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2")

OWN_INPUT_NORM = "post_per_layer_input_norm"
LAUREL_SCALE = 2**-0.5  # of the sum of the stream after the mixer and of LAuReL's output


class Mixer(Protocol):
    """The part of a layer that looks at other positions."""

    def __call__(
        self, x_BSD: jax.Array, tokens: Tokens, cache: Any, layer: jax.Array, keys: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        """(its output, the cache with these tokens or `NewKeys`). cache: of `init_cache`, or None. layer: its index in
        the stack. keys: four PRNG keys for dropout in adapters, or None.
        """

    def init_cache(self, layers: int, batch: int, length: int) -> MixerCache | None:
        """The empty cache of a stack of such layers, for rows of up to `length` tokens; None if they have none."""


MixerShape = AttentionShape | LatentShape | DeltaNetShape | Mamba2Shape | ShortConvShape
# By the class of a mixer's shape: the mixer's name in Hugging Face's modules, and its class.
MIXERS: dict[type[MixerShape], tuple[str, Callable[..., Mixer]]] = {
    AttentionShape: ("self_attn", Attention),
    BorrowedShape: ("self_attn", BorrowedAttention),
    LatentShape: ("self_attn", LatentAttention),
    DeltaNetShape: ("linear_attn", DeltaNet),
    Mamba2Shape: ("mamba", Mamba2),
    ShortConvShape: ("conv", ShortConv),
}


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """The parts of one layer.

    mixer: what looks at other positions; its class is in MIXERS. Either part may be None. norms: the names of their
    inputs' and outputs' norms. parallel: the feed-forward has the mixer's input, and both are added at once.
    residual_scale: factor on what is added to the stream. output_scale: whether a `Constant` multiplies the stream
    after the layer. experts: beside the feed-forward, with its input before the norm; the router sees that without a
    norm, and the sum of both outputs is normalised. per_layer_input: the width of the layer's own input for each token,
    added to the stream last (`nn.per_layer`); None for none. altup: the residual has several streams, [A, B, S, D]; the
    layer's own input is added to all but the first. laurel: the rank of a learnt part of the residual connection beside
    the mixer; None for none.
    """

    mixer: MixerShape | None
    mlp: MLPShape | MoEShape | None
    norm: NormShape
    norms: NormNames = BEFORE
    parallel: bool = False
    residual_scale: float = 1.0
    output_scale: bool = False
    experts: MoEShape | None = None
    per_layer_input: int | None = None
    altup: AltUpShape | None = None
    laurel: int | None = None

    @property
    def moe(self) -> MoEShape | None:
        """The layer's experts, if it has any."""
        return self.mlp if isinstance(self.mlp, MoEShape) else self.experts

    @property
    def width(self) -> int:
        """The width of the residual stream."""
        part = self.mlp if self.mixer is None else self.mixer
        return 0 if part is None else part.width

    @property
    def attention(self) -> AttentionShape | None:
        """The mixer if it is attention with keys and values of its own heads."""
        return self.mixer if isinstance(self.mixer, AttentionShape) else None

    @property
    def recurrent(self) -> bool:
        """Whether the mixer passes a state along the positions of a row."""
        return isinstance(self.mixer, DeltaNetShape | Mamba2Shape | ShortConvShape)

    @property
    def heads(self) -> tuple[int, ...]:
        """The numbers of heads that a division of attention over devices must divide."""
        if isinstance(self.mixer, LatentShape):
            return (self.mixer.heads,)
        return () if self.attention is None else (self.attention.heads, self.attention.kv_heads)


class Block(nnx.Module):
    """x + after(mixer(before(x))), then the same with the feed-forward."""

    def __init__(
        self, shape: BlockShape, *, stddev: float, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.norms, self.parallel, self.residual_scale = shape.norms, shape.parallel, shape.residual_scale
        options: dict[str, Any] = {"stddev": stddev, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        for name in filter(None, self.norms):
            setattr(self, name, Norm(shape.width, shape.norm, dtype=dtype, param_dtype=param_dtype))
        self.mixer_name: str | None = None
        if shape.mixer is not None:
            self.mixer_name, mixer = MIXERS[type(shape.mixer)]
            setattr(self, self.mixer_name, mixer(shape.mixer, shape.norm, **options))
        self.mlp: MLP | MoE | None = nnx.data(None)
        if shape.mlp is not None:
            self.mlp = MoE(shape.mlp, **options) if isinstance(shape.mlp, MoEShape) else MLP(shape.mlp, **options)
        self.experts: MoE | None = nnx.data(None)
        if shape.experts is not None:
            self.experts = MoE(shape.experts, **options)
            for name in EXPERT_NORMS:
                setattr(self, name, Norm(shape.width, shape.norm, dtype=dtype, param_dtype=param_dtype))
        self.has_own_input = shape.per_layer_input is not None
        if shape.per_layer_input is not None:  # the names are those of files
            kept = options | {"keep": "dots"}
            self.per_layer_input_gate = Linear(shape.width, shape.per_layer_input, **kept)
            self.per_layer_projection = Linear(shape.per_layer_input, shape.width, tp_side="inputs", **kept)
            setattr(self, OWN_INPUT_NORM, Norm(shape.width, shape.norm, dtype=dtype, param_dtype=param_dtype))
        self.altup: AltUp | None = nnx.data(None)
        if shape.altup is not None:
            self.altup = AltUp(shape.width, shape.altup, shape.norm, **options)
        self.laurel: Laurel | None = nnx.data(None)
        if shape.laurel is not None:
            self.laurel = Laurel(shape.width, shape.laurel, shape.norm, **options)
        # The name is that of files.
        self.layer_scalar = Constant(jnp.ones((1,), param_dtype)) if shape.output_scale else None

    @property
    def mixer(self) -> Mixer | None:
        """The part that looks at other positions."""
        return None if self.mixer_name is None else getattr(self, self.mixer_name)

    @property
    def moe(self) -> MoE | None:
        """The layer's experts, if it has any."""
        return self.mlp if isinstance(self.mlp, MoE) else self.experts

    @property
    def attention(self) -> Attention | None:
        """The mixer if it is attention."""
        return self.mixer if isinstance(self.mixer, Attention) else None

    def __call__(
        self,
        x_BSD: jax.Array,
        tokens: Tokens,
        cache: MixerCache | None,
        layer: jax.Array,
        key: jax.Array | None,
        routing: RouterSums | None = None,
    ) -> tuple[jax.Array, MixerCache | NewKeys | None, RouterSums | None]:
        """(the residual stream, the cache including these tokens or `NewKeys`, `routing` including these tokens).

        layer: this layer's index in its stack. key: turns dropout on. routing: None if no loss reads the sums.
        """
        return self.with_kept(x_BSD, tokens, cache, layer, key, routing, None)[:3]

    def with_kept(
        self,
        x_BSD: jax.Array,
        tokens: Tokens,
        cache: MixerCache | None,
        layer: jax.Array,
        key: jax.Array | None,
        routing: RouterSums | None,
        own_BSP: jax.Array | None,
    ) -> tuple[jax.Array, MixerCache | NewKeys | None, RouterSums | None, Kept | None]:
        """As a call, and the keys and values of the tokens if the layer keeps them.

        own_BSP: the layer's own input, None if it has none. x_BSD: with AltUp all streams, [A, B, S, D].
        """
        if self.altup is None:
            x_BSD, written, routing, kept = self._computed(x_BSD, tokens, cache, layer, key, routing)
        else:
            predicted_ABSD = self.altup.predict(x_BSD, key)
            active_BSD = predicted_ABSD[self.altup.shape.active]
            active_BSD, written, routing, kept = self._computed(active_BSD, tokens, cache, layer, key, routing)
            x_BSD = self.altup.correct(predicted_ABSD, active_BSD, key)
        if own_BSP is not None and self.has_own_input:
            x_BSD = self._with_own_input(x_BSD, own_BSP, key)
        if self.layer_scalar is not None:
            x_BSD = x_BSD * self.layer_scalar.get_value().astype(x_BSD.dtype)
        return x_BSD, written, routing, kept

    def storage_dims(self) -> dict[str, StorageDims]:
        return {"layer_scalar": StorageDims((None,))}

    def _computed(
        self,
        x_BSD: jax.Array,
        tokens: Tokens,
        cache: MixerCache | None,
        layer: jax.Array,
        key: jax.Array | None,
        routing: RouterSums | None,
    ) -> tuple[jax.Array, MixerCache | NewKeys | None, RouterSums | None, Kept | None]:
        """The stream after mixer and feed-forward, and the rest as in `with_kept`."""
        kept: Kept | None = None
        written: MixerCache | NewKeys | None = cache
        keys = None if key is None else jax.random.split(key, 7)
        mixer_keys, mlp_keys = (None, None) if keys is None else (keys[:4], keys[4:])
        input_BSD = self._norm(0, x_BSD)
        whole_BSD = whole(input_BSD)
        if self.mixer is not None:
            if self.attention is not None and self.attention.shape.kept_as is not None:
                mixed_BSD, written, kept = self.attention.with_keys(
                    whole_BSD, tokens, cast(Any, cache), layer, mixer_keys
                )
            else:
                mixed_BSD, written = self.mixer(whole_BSD, tokens, cache, layer, mixer_keys)
            x_BSD = x_BSD + self._added(1, stream(mixed_BSD))
            if self.laurel is not None:
                x_BSD = self._with_laurel(self.laurel, x_BSD, input_BSD, whole_BSD, key)
            if self.norms[1] is None:
                x_BSD = checkpoint_name(x_BSD, "dots")
        if self.mlp is not None:
            input_BSD = input_BSD if self.parallel else self._norm(2, x_BSD)
            output_BSD, routing = _feed_forward(self.mlp, input_BSD, tokens, mlp_keys, routing)
            if self.experts is not None:
                output_BSD, routing = self._with_experts(self.experts, output_BSD, x_BSD, tokens, routing)
            x_BSD = x_BSD + self._added(3, output_BSD)
        return x_BSD, written, routing, kept

    def _with_laurel(
        self, laurel: Laurel, x_BSD: jax.Array, input_BSD: jax.Array, whole_BSD: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        """The stream x_BSD after the mixer and LAuReL's output for the mixer's input, added up."""
        learnt_BSD = laurel(input_BSD, whole_BSD, None if key is None else jax.random.fold_in(key, 9))
        return ((x_BSD + learnt_BSD).astype(jnp.float32) * LAUREL_SCALE).astype(x_BSD.dtype)

    def _with_own_input(self, x_BSD: jax.Array, own_BSP: jax.Array, key: jax.Array | None) -> jax.Array:
        """The stream with what the layer's own input adds; of several streams, all but the first have it."""
        if self.altup is None:
            return x_BSD + self._from_own_input(x_BSD, own_BSP, key)
        added_BSD = self._from_own_input(self.altup.gate_input(x_BSD), own_BSP, key)
        return jnp.concatenate([x_BSD[:1], x_BSD[1:] + added_BSD])

    def _from_own_input(self, x_BSD: jax.Array, own_BSP: jax.Array, key: jax.Array | None) -> jax.Array:
        """What the layer's own input adds to the stream, through a gate that the stream opens."""
        # Not of the keys of the other layers, which models without such inputs have too.
        gate_key, out_key = (None, None) if key is None else jax.random.split(jax.random.fold_in(key, 7))
        gate_BSP = jax.nn.gelu(self.per_layer_input_gate(whole(x_BSD), gate_key), approximate=True)
        gated_BSP = gate_BSP * split(own_BSP, "batch", "sequence", "tensor")
        return getattr(self, OWN_INPUT_NORM)(stream(self.per_layer_projection(gated_BSP, out_key)))

    def _with_experts(
        self, experts: MoE, output_BSD: jax.Array, x_BSD: jax.Array, tokens: Tokens, routing: RouterSums | None
    ) -> tuple[jax.Array, RouterSums | None]:
        """The feed-forward's output_BSD plus that of the experts. x_BSD: the stream before both."""
        after_mlp, before, after = (getattr(self, name) for name in EXPERT_NORMS)
        input_BSD = before(x_BSD)
        if routing is None:
            routed_BSD = experts(input_BSD, seen_BSD=x_BSD)
        else:
            routed_BSD, routing = experts.with_router_sums(input_BSD, tokens.segments_BS, routing, seen_BSD=x_BSD)
        return after_mlp(output_BSD) + after(routed_BSD), routing

    def _norm(self, position: int, x_BSD: jax.Array) -> jax.Array:
        name = self.norms[position]
        return x_BSD if name is None else getattr(self, name)(x_BSD)

    def _added(self, position: int, x_BSD: jax.Array) -> jax.Array:
        """The output of a part as it is added to the stream. position: of its norm, whose gradient reads the output."""
        if self.norms[position] is not None:
            x_BSD = self._norm(position, checkpoint_name(x_BSD, "dots"))
        if self.residual_scale == 1.0:
            return x_BSD
        return (x_BSD.astype(jnp.float32) * self.residual_scale).astype(x_BSD.dtype)


def _feed_forward(
    mlp: MLP | MoE, input_BSD: jax.Array, tokens: Tokens, keys: jax.Array | None, routing: RouterSums | None
) -> tuple[jax.Array, RouterSums | None]:
    if not isinstance(mlp, MoE):
        return stream(mlp(whole(input_BSD), keys)), routing
    if routing is None:
        return mlp(input_BSD, keys), None
    return mlp.with_router_sums(input_BSD, tokens.segments_BS, routing, keys)
