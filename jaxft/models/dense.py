"""What the dense families share: their sizes under Hugging Face's names, and the table of their tensors."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxft.errors import ModelError
from jaxft.models.hf_fields import check_fields, require
from jaxft.models.tensor_map import TensorMap, linear
from jaxft.nn.attention.layer import AttentionShape
from jaxft.nn.attention.rope import Rope
from jaxft.nn.attention.score_form import PLAIN, ScoreForm
from jaxft.nn.block import NORMS, BlockShape
from jaxft.nn.decoder import DecoderShape
from jaxft.nn.experts.layer import MoEShape
from jaxft.nn.mlp import MLPShape
from jaxft.nn.norm import NormShape

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters")
SLIDING, FULL = "sliding_attention", "full_attention"  # Hugging Face's names for kinds of layers


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """Sizes under Hugging Face's names. The subclass of a family adds its own fields and methods."""

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
    initializer_range: float = 0.02
    max_position_embeddings: int = 2048

    def attention(
        self,
        *,
        form: ScoreForm = PLAIN,
        qk_norm: Literal["head", "whole"] | None = None,
        bias: bool = False,
        output_bias: bool = False,
        fused: bool = False,
        sinks: bool = False,
        rope: int = 0,
    ) -> AttentionShape:
        """Attention of these sizes."""
        return AttentionShape(
            width=self.hidden_size,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            use_bias=bias,
            use_output_bias=output_bias,
            form=form,
            qk_norm=qk_norm,
            fused=fused,
            sinks=sinks,
            rope=rope,
        )

    def mlp(self, *, activation: str = "silu", bias: bool = False, fused: bool = False) -> MLPShape:
        """A feed-forward layer of these sizes."""
        return MLPShape(
            width=self.hidden_size, hidden=self.intermediate_size, activation=activation, use_bias=bias, fused=fused
        )

    def alike(self, attention: AttentionShape, mlp: MLPShape | MoEShape, *, norms: str = "before") -> DecoderShape:
        """A decoder all of whose layers are equal."""
        norm = NormShape(eps=self.rms_norm_eps)
        block = BlockShape(attention=attention, mlp=mlp, norm=norm, norms=norms)
        return DecoderShape(layers=(block,) * self.num_hidden_layers, ropes=(self.rope,), norm=norm)

    def tensors(self) -> tuple[TensorMap, ...]:
        """The table of parameters that a model of this config has, read off the shape of its layers.

        All layers of a model have the same parameters, whatever their windows and ropes are.
        """
        block = self.shape().layers[0]
        layer, path = "model.layers.{i}", "layers/*"
        attention = block.attention
        projections = ("qkv_proj",) if attention.fused else ("q_proj", "k_proj", "v_proj")
        linears = {
            **dict.fromkeys((f"self_attn.{name}" for name in projections), attention.use_bias),
            "self_attn.o_proj": attention.use_output_bias,
        }
        norms = [name for name in NORMS[block.norms] if name is not None]
        norms += ["self_attn.q_norm", "self_attn.k_norm"] if attention.qk_norm else []
        return (
            TensorMap("model.embed_tokens.weight", "embed_tokens/embedding"),
            TensorMap("model.norm.weight", "norm/scale"),
            *(() if self.tie_word_embeddings else linear("lm_head", "lm_head")),
            *(TensorMap(f"{layer}.{name}.weight", f"{path}/{name.replace('.', '/')}/scale") for name in norms),
            *(
                line
                for name, bias in linears.items()
                for line in linear(f"{layer}.{name}", f"{path}/{name.replace('.', '/')}", bias=bias)
            ),
            *((TensorMap(f"{layer}.self_attn.sinks", f"{path}/self_attn/sinks"),) if attention.sinks else ()),
            *self.mlp_tensors(block),
        )

    def mlp_tensors(self, block: BlockShape) -> tuple[TensorMap, ...]:
        """The lines of a layer's feed-forward part."""
        inputs = ("gate_up_proj",) if block.mlp.fused else ("gate_proj", "up_proj")
        return tuple(
            line
            for name in (*inputs, "down_proj")
            for line in linear(f"model.layers.{{i}}.mlp.{name}", f"layers/*/mlp/{name}", bias=block.mlp.use_bias)
        )

    def hf_fields(self) -> dict[str, Any]:
        """The fields of `config.json`, but for those that name the family."""
        fields = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, Rope):
                fields[field.name] = list(value) if isinstance(value, tuple) else value
        return fields | self.rope.to_hf()


def with_defaults(hf: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what it leaves out as transformers fills it in."""
    return {**defaults, **hf}


def read_sizes(
    hf: Mapping[str, Any], family: type[DenseConfig], *, used: Iterable[str] = (), must_equal: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of DenseConfig but its rope, after every field of `hf` was found to be understood.

    used: fields that the family reads besides its own dataclass fields. must_equal: fields whose one implemented
    value is given. Raises ModelError naming what is missing, unknown or does not fit together.
    """
    require(hf, SIZES)
    own = (field.name for field in dataclasses.fields(family))
    check_fields(hf, used=[*own, *ROPE_FIELDS, *used], must_equal=must_equal)
    heads, width = hf["num_attention_heads"], hf["hidden_size"]
    kv_heads, head_dim = hf.get("num_key_value_heads") or heads, hf.get("head_dim") or width // heads
    if heads % kv_heads:
        raise ModelError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
    if not hf.get("head_dim") and width % heads:
        raise ModelError(f"hidden_size={width} is not a multiple of num_attention_heads={heads}")
    if head_dim % 2:
        raise ModelError(f"head_dim={head_dim} is odd: rotary embeddings turn pairs")
    return {
        **{name: hf[name] for name in SIZES},
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": hf.get("rms_norm_eps", 1e-6),
        "tie_word_embeddings": hf.get("tie_word_embeddings", False),
        "initializer_range": hf.get("initializer_range", 0.02),
        "max_position_embeddings": hf.get("max_position_embeddings", 2048),
    }


def read_rope(hf: Mapping[str, Any], head_dim: int, *, partial: bool = False, scaled_queries: bool = False) -> Rope:
    """The rope of config.json. partial: whether the family turns only part of a head where asked to. scaled_queries:
    whether it multiplies queries by a factor of their position where asked to.

    Raises ModelError for what is not implemented or does not fit the heads.
    """
    rope = Rope.from_hf(hf)
    if rope.partial_rotary_factor != 1.0 and not partial:
        raise ModelError(
            f"rope partial_rotary_factor={rope.partial_rotary_factor} is not implemented for model_type "
            f"{hf.get('model_type')!r}"
        )
    if rope.llama_4_scaling_beta is not None and not scaled_queries:
        raise ModelError(
            f"rope llama_4_scaling_beta={rope.llama_4_scaling_beta} is not implemented for model_type "
            f"{hf.get('model_type')!r}"
        )
    rope.check(head_dim)
    return rope


def ropes_by_kind(hf: Mapping[str, Any], thetas: Mapping[str, float]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `read_rope` reads for FULL and for SLIDING layers, which have a rope each. thetas: where none is nested.

    A scaling that is not nested is of FULL layers. Raises ModelError for rope_parameters of another form.
    """
    shared = {"model_type": hf["model_type"], "max_position_embeddings": hf["max_position_embeddings"]}
    nested = hf.get("rope_parameters") or {}
    unknown = sorted(set(nested) - {FULL, SLIDING})
    if unknown:
        raise ModelError(
            f"rope_parameters of model_type {hf['model_type']!r} are nested by kind of layer; unknown: {unknown}"
        )
    flat = {"rope_scaling": hf.get("rope_scaling"), "rope_theta": thetas[FULL]}
    return (
        shared | (flat if FULL not in nested else {"rope_parameters": {"rope_theta": thetas[FULL], **nested[FULL]}}),
        shared | {"rope_parameters": {"rope_theta": thetas[SLIDING], **nested.get(SLIDING, {})}},
    )


def read_layer_types(hf: Mapping[str, Any], default: Iterable[str]) -> tuple[str, ...]:
    """`layer_types`, or the default where absent. Raises ModelError for a wrong length or an unknown kind."""
    types = tuple(hf.get("layer_types") or default)
    unknown = sorted(set(types) - {SLIDING, FULL})
    if unknown or len(types) != hf["num_hidden_layers"]:
        raise ModelError(
            f"layer_types must name {SLIDING} or {FULL} for each of num_hidden_layers={hf['num_hidden_layers']} "
            f"layers, got {len(types)}" + (f" with {', '.join(unknown)}" if unknown else "")
        )
    return types


def check_window(window: Any, where: str = "sliding_window") -> None:
    """Raises ModelError unless a window is a whole number above zero."""
    if not isinstance(window, int) or window < 1:
        raise ModelError(f"{where}={window!r}: a window is a whole number of tokens above zero")
