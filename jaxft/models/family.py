"""The Config that every model family extends: sizes under Hugging Face's names, and the table of its tensors."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxft.errors import ModelError
from jaxft.files.json_fields import OBJECT, check_kinds
from jaxft.models.hf_fields import ALLOWED, check_fields, require
from jaxft.models.score_model import LANGUAGE_MODEL, SCORE_MODEL
from jaxft.models.tensor_map import ONE_ROW, TensorMap, linear
from jaxft.nn.attention.layer import AttentionShape
from jaxft.nn.attention.rope import Rope
from jaxft.nn.attention.score_form import PLAIN, ScoreForm
from jaxft.nn.block import NORMS, BlockShape, NormPositions
from jaxft.nn.decoder import DecoderShape
from jaxft.nn.experts.layer import MoEShape
from jaxft.nn.mlp import Activation, MLPShape
from jaxft.nn.norm import NormShape
from jaxft.nn.score import Head

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters")
# Fields of config.json that describe ropes in the dialects of transformers 4 and 5.
ROPE_DIALECTS = (*ROPE_FIELDS, "rope_local_base_freq", "partial_rotary_factor", "original_max_position_embeddings")
NOT_IN_FILES = ("head", "dense_tensors")  # fields of FamilyConfig that are none of config.json
SLIDING, FULL = "sliding_attention", "full_attention"  # values of Hugging Face's layer_types


@dataclass(frozen=True, kw_only=True)
class FamilyConfig(ABC):
    """Sizes under Hugging Face's names. The subclass of a family adds its own fields and the three abstract methods.

    head: what the model ends in. No field of config.json: there the name of the architecture says it. dense_tensors:
    Hugging Face's names of the tensors that stay dense if the model is quantised while it is loaded; no field either.
    """

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
    head: Head = "vocabulary"
    dense_tensors: frozenset[str] = frozenset()

    @classmethod
    @abstractmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "FamilyConfig":
        """Reads the parsed `config.json` of transformers 4 or 5. Raises ModelError for fields not implemented."""

    @abstractmethod
    def to_hf(self) -> dict[str, Any]:
        """The same as `config.json`, in the dialect that transformers 4 and 5 both read."""

    @abstractmethod
    def shape(self) -> DecoderShape:
        """The network."""

    def rope_fields(self) -> dict[str, Any]:
        """The ropes as config.json has them in both dialects, since readers of one do not see the other's fields.

        transformers 4 reads rope_theta and rope_scaling, transformers 5 also rope_parameters.
        """
        own = self.to_hf()
        fields = {name: own[name] for name in ROPE_DIALECTS if name in own}
        return {"rope_parameters": self.rope.to_parameters()} | fields

    def score_architecture(self) -> str:
        """The class of a reward model of this family in transformers."""
        return str(self.to_hf()["architectures"][0]).replace(LANGUAGE_MODEL, SCORE_MODEL)

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
        """The shape of an attention layer of these sizes."""
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

    def mlp(self, *, activation: Activation = "silu", bias: bool = False, fused: bool = False) -> MLPShape:
        """The shape of a feed-forward layer of these sizes."""
        return MLPShape(
            width=self.hidden_size, hidden=self.intermediate_size, activation=activation, use_bias=bias, fused=fused
        )

    def uniform(
        self, attention: AttentionShape, mlp: MLPShape | MoEShape, *, norms: NormPositions = "before"
    ) -> DecoderShape:
        """The shape of a decoder whose layers are all equal."""
        norm = NormShape(eps=self.rms_norm_eps)
        block = BlockShape(attention=attention, mlp=mlp, norm=norm, norms=norms)
        return DecoderShape(layers=(block,) * self.num_hidden_layers, ropes=(self.rope,), norm=norm)

    def tensors(self) -> tuple[TensorMap, ...]:
        """The table of this model's parameters, derived from the shape of its first layer.

        All layers of a model have the same parameters; only their windows and ropes may differ.
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
            *self.head_tensors(),
            *(TensorMap(f"{layer}.{name}.weight", f"{path}/{name.replace('.', '/')}/scale") for name in norms),
            *(
                line
                for name, bias in linears.items()
                for line in linear(f"{layer}.{name}", f"{path}/{name.replace('.', '/')}", bias=bias)
            ),
            *((TensorMap(f"{layer}.self_attn.sinks", f"{path}/self_attn/sinks"),) if attention.sinks else ()),
            *self.mlp_tensors(block),
        )

    def head_tensors(self) -> tuple[TensorMap, ...]:
        """The table's lines for the LM head or the score head; none for a head that is the embedding table."""
        if self.head == "score":
            return (TensorMap("score.weight", "value/weight", ONE_ROW),)
        return () if self.tie_word_embeddings else linear("lm_head", "lm_head")

    def mlp_tensors(self, block: BlockShape) -> tuple[TensorMap, ...]:
        """The table's lines for the feed-forward part of a layer."""
        inputs = ("gate_up_proj",) if block.mlp.fused else ("gate_proj", "up_proj")
        return tuple(
            line
            for name in (*inputs, "down_proj")
            for line in linear(f"model.layers.{{i}}.mlp.{name}", f"layers/*/mlp/{name}", bias=block.mlp.use_bias)
        )

    def hf_fields(self) -> dict[str, Any]:
        """The fields of `config.json`, except those that name the family."""
        fields = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in NOT_IN_FILES and not isinstance(value, Rope):
                fields[field.name] = list(value) if isinstance(value, tuple) else value
        return fields | self.rope.to_hf()


def with_defaults(hf: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with absent fields filled in as transformers does."""
    return {**defaults, **hf}


def read_sizes(
    hf: Mapping[str, Any], family: type[FamilyConfig], *, used: Iterable[str] = (), must_equal: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of FamilyConfig except its rope. Checks first that every field of `hf` is understood.

    used: fields that the family reads besides its own dataclass fields. must_equal: fields with only one implemented
    value, and that value. Raises ModelError naming fields that are missing, unknown or inconsistent.
    """
    require(hf, SIZES)
    own = (field.name for field in dataclasses.fields(family) if field.name not in NOT_IN_FILES)
    check_fields(hf, used=[*own, *ROPE_FIELDS, *used], must_equal=must_equal)
    heads, width = hf["num_attention_heads"], hf["hidden_size"]
    kv_heads, head_dim = hf.get("num_key_value_heads") or heads, hf.get("head_dim") or width // heads
    if heads % kv_heads:
        raise ModelError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
    if not hf.get("head_dim") and width % heads:
        raise ModelError(f"hidden_size={width} is not a multiple of num_attention_heads={heads}")
    if head_dim % 2:
        raise ModelError(f"head_dim={head_dim} is odd: rotary embeddings rotate pairs of dimensions")
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
    """The rope of config.json.

    partial: whether the family implements partial_rotary_factor, which rotates only a part of each head.
    scaled_queries: whether it implements llama_4_scaling_beta, which scales queries by their position. Raises
    ModelError for settings that are not implemented or do not fit the heads.
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
    """(config.json for the rope of FULL layers, the same for SLIDING layers), each for `read_rope`.

    thetas: rope_theta of each kind, unless nested rope_parameters give one. A scaling that is not nested belongs to
    FULL layers. Raises ModelError for rope_parameters of another form.
    """
    names = ("model_type", "max_position_embeddings", ALLOWED)
    shared = {name: hf[name] for name in names if name in hf}
    nested = hf.get("rope_parameters") or {}
    unknown = sorted(set(nested) - {FULL, SLIDING})
    if unknown:
        raise ModelError(
            f"rope_parameters of model_type {hf['model_type']!r} are nested by kind of layer; unknown: {unknown}"
        )
    check_kinds(nested, {FULL: OBJECT, SLIDING: OBJECT}, "rope_parameters of config.json")
    flat = {"rope_scaling": hf.get("rope_scaling"), "rope_theta": thetas[FULL]}
    return (
        shared | (flat if FULL not in nested else {"rope_parameters": {"rope_theta": thetas[FULL], **nested[FULL]}}),
        shared | {"rope_parameters": {"rope_theta": thetas[SLIDING], **nested.get(SLIDING, {})}},
    )


def read_layer_types(hf: Mapping[str, Any], default: Iterable[str]) -> tuple[str, ...]:
    """`layer_types`, or the default if absent. Raises ModelError for a wrong length or an unknown type."""
    types = tuple(hf.get("layer_types") or default)
    unknown = sorted(set(types) - {SLIDING, FULL})
    if unknown or len(types) != hf["num_hidden_layers"]:
        raise ModelError(
            f"layer_types must name {SLIDING} or {FULL} for each of num_hidden_layers={hf['num_hidden_layers']} "
            f"layers, got {len(types)}" + (f" with {', '.join(unknown)}" if unknown else "")
        )
    return types


def check_window(window: Any, where: str = "sliding_window") -> None:
    """Raises ModelError unless a window is a whole number, 1 or more."""
    if not isinstance(window, int) or window < 1:
        raise ModelError(f"{where}={window!r}: a window is a whole number of tokens, 1 or more")
