"""Llama 2, 3, 3.1, 3.2, 3.3 and models of the same architecture, such as SmolLM2 (arXiv:2407.21783)."""

# B batch, S sequence, D model

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxft.errors import ModelError
from jaxft.models.hf_fields import check_fields, require
from jaxft.models.tensor_map import TensorMap, linear
from jaxft.nn.attention import Attention, AttentionShape, Tokens
from jaxft.nn.cache import LayerCache
from jaxft.nn.decoder import Decoder
from jaxft.nn.mlp import GatedMLP
from jaxft.nn.norm import RMSNorm
from jaxft.nn.rope import Rope

MODEL_TYPES = ("llama",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    max_position_embeddings: int = 2048

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads `config.json` of transformers 4 or 5. Raises ModelError for fields it does not implement."""
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        require(hf, sizes)
        check_fields(
            hf,
            used=[
                *(f.name for f in dataclasses.fields(cls)), "rope_theta", "rope_scaling", "rope_parameters",
            ],
            must_equal={"hidden_act": "silu"},
        )  # fmt: skip
        heads = hf["num_attention_heads"]
        config = cls(
            **{name: hf[name] for name in sizes},
            num_key_value_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
            rope=Rope.from_hf(hf),
            tie_word_embeddings=hf.get("tie_word_embeddings", False),
            attention_bias=hf.get("attention_bias", False),
            mlp_bias=hf.get("mlp_bias", False),
            initializer_range=hf.get("initializer_range", 0.02),
            max_position_embeddings=hf.get("max_position_embeddings", 2048),
        )
        if heads % config.num_key_value_heads:
            raise ModelError(
                f"num_attention_heads={heads} is not a multiple of num_key_value_heads={config.num_key_value_heads}"
            )
        if not hf.get("head_dim") and config.hidden_size % heads:
            raise ModelError(f"hidden_size={config.hidden_size} is not a multiple of num_attention_heads={heads}")
        if config.head_dim % 2:
            raise ModelError(f"head_dim={config.head_dim} is odd: rotary embeddings turn pairs")
        return config

    def to_hf(self) -> dict[str, Any]:
        """The same as `config.json`, in the dialect that transformers 4 and 5 both read."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "rope"}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            **fields,
            **self.rope.to_hf(),
        }

    def tensors(self) -> tuple[TensorMap, ...]:
        """The table of parameters that a model of this config has."""
        layer, path = "model.layers.{i}", "layers/*"
        attention, mlp = self.attention_bias, self.mlp_bias
        head = () if self.tie_word_embeddings else linear("lm_head", "lm_head")
        return (
            TensorMap("model.embed_tokens.weight", "embed_tokens/embedding"),
            TensorMap("model.norm.weight", "norm/scale"),
            *head,
            TensorMap(f"{layer}.input_layernorm.weight", f"{path}/input_layernorm/scale"),
            TensorMap(f"{layer}.post_attention_layernorm.weight", f"{path}/post_attention_layernorm/scale"),
            *(
                line
                for name in ("q_proj", "k_proj", "v_proj", "o_proj")
                for line in linear(f"{layer}.self_attn.{name}", f"{path}/self_attn/{name}", bias=attention)
            ),
            *(
                line
                for name in ("gate_proj", "up_proj", "down_proj")
                for line in linear(f"{layer}.mlp.{name}", f"{path}/mlp/{name}", bias=mlp)
            ),
        )


class Layer(nnx.Module):
    """Attention and feed-forward, each normalised before and added to the stream."""

    def __init__(self, config: Config, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        types = {"dtype": dtype, "param_dtype": param_dtype}
        stddev = config.initializer_range
        shape = AttentionShape(
            width=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            use_bias=config.attention_bias,
            use_output_bias=config.attention_bias,
        )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **types)
        self.self_attn = Attention(shape, stddev=stddev, rngs=rngs, **types)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **types)
        self.mlp = GatedMLP(
            config.hidden_size, config.intermediate_size, use_bias=config.mlp_bias, stddev=stddev, rngs=rngs, **types
        )

    def __call__(
        self,
        x_BSD: jax.Array,
        tokens: Tokens,
        cache: LayerCache | None,
        layer: jax.Array,
        key: jax.Array | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        keys = None if key is None else jax.random.split(key, 7)
        attention_keys, mlp_keys = (None, None) if keys is None else (keys[:4], keys[4:])
        attended, cache = self.self_attn(self.input_layernorm(x_BSD), tokens, cache, layer, attention_keys)
        x_BSD = checkpoint_name(x_BSD + attended, "dots")
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD), mlp_keys), cache


class Model(Decoder):
    """A Llama of the given config."""

    def __init__(
        self, config: Config, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs, remat: str = "none"
    ) -> None:
        def make_layer(kind: str, rngs: nnx.Rngs) -> Layer:
            return Layer(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        super().__init__(
            config,
            kinds=("layer",) * config.num_hidden_layers,
            make_layer=make_layer,
            rope=config.rope,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
            remat=remat,
        )
