"""LFM2: most layers have a short convolution between two gates, the others attention (arXiv:2511.23404)."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ModelError
from jaxft.models.family import FULL, LAYER, FamilyConfig, no_reward_model, read_rope, read_sizes, with_defaults
from jaxft.models.field_kinds import MOST_WIDTH
from jaxft.models.tensor_map import DEPTHWISE, TensorMap, linear
from jaxft.nn.attention.shape import AttentionShape
from jaxft.nn.block import BlockShape, NormNames
from jaxft.nn.decoder import Decoder, DecoderShape
from jaxft.nn.experts.layer import MoEShape
from jaxft.nn.mlp import MLPShape
from jaxft.nn.norm import NormShape
from jaxft.nn.recurrent.short_conv import ShortConvShape

MODEL_TYPES = ("lfm2",)
CONV = "conv"
# For both families; what differs is in the DEFAULTS of each.
SHARED_DEFAULTS = {
    "vocab_size": 65536, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 128000, "norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 1e6,
    "conv_bias": False, "conv_L_cache": 3,
}  # fmt: skip
DEFAULTS = SHARED_DEFAULTS | {
    "hidden_size": 2560, "intermediate_size": 12288, "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
}  # fmt: skip
OWN = (
    "conv_bias", "conv_L_cache", "block_multiple_of", "block_ffn_dim_multiplier", "block_auto_adjust_ff_dim",
)  # fmt: skip
# Older names of fields, as transformers reads them, and how weights were drawn.
SHARED_USED = ("norm_eps", "full_attn_idxs", "conv_use_xavier_init", "theta")
USED = (
    *SHARED_USED, "block_ff_dim", "tie_embedding", "block_mlp_init_scale", "block_out_init_scale",
    "block_use_xavier_init",
)  # fmt: skip
OLD_NAMES = {"block_ff_dim": "intermediate_size", "tie_embedding": "tie_word_embeddings"}
NORMS: NormNames = ("operator_norm", None, "ffn_norm", None)


@dataclass(frozen=True, kw_only=True)
class ConvConfig(FamilyConfig):
    """What LFM2 and its model with experts share.

    rms_norm_eps: called norm_eps in files. layer_types: CONV or FULL for each layer. conv_L_cache: taps of the
    convolutions.
    """

    final_norm = "model.embedding_norm"

    layer_types: tuple[str, ...]
    conv_bias: bool
    conv_L_cache: int

    def hf_fields(self) -> dict[str, Any]:
        """See FamilyConfig."""
        fields = super().hf_fields()
        return {"norm_eps": fields.pop("rms_norm_eps")} | fields

    def layers(self, feed_forwards: Iterable[MLPShape | MoEShape]) -> DecoderShape:
        """Pre-norm layers in the order of `layer_types`. feed_forwards: one a layer."""
        norm = NormShape(eps=self.rms_norm_eps)
        mixers: dict[str, ShortConvShape | AttentionShape] = {
            CONV: ShortConvShape(width=self.hidden_size, taps=self.conv_L_cache, use_bias=self.conv_bias),
            FULL: self.attention(qk_norm="head"),
        }
        return DecoderShape(
            layers=tuple(
                BlockShape(mixer=mixers[kind], mlp=mlp, norm=norm, norms=NORMS)
                for kind, mlp in zip(self.layer_types, feed_forwards, strict=True)
            ),
            ropes=(self.rope,),
            norm=norm,
        )

    def mixer_tensors(self, block: BlockShape) -> Iterable[TensorMap]:
        """See FamilyConfig."""
        return _conv_tensors(block.mixer) if isinstance(block.mixer, ShortConvShape) else _attention_tensors()

    def mlp_tensors(self, block: BlockShape) -> Iterable[TensorMap]:
        """See FamilyConfig."""
        for ours, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            yield from linear(f"{LAYER}.feed_forward.{theirs}", f"layers/*/mlp/{ours}")


def _conv_tensors(shape: ShortConvShape) -> Iterator[TensorMap]:
    module, path = f"{LAYER}.conv", "layers/*/conv"
    for name in ("in_proj", "out_proj"):
        yield from linear(f"{module}.{name}", f"{path}/{name}", bias=shape.use_bias)
    yield TensorMap(f"{module}.conv.weight", f"{path}/conv1d/taps", DEPTHWISE)
    if shape.use_bias:
        yield TensorMap(f"{module}.conv.bias", f"{path}/conv1d/bias")


def _attention_tensors() -> Iterator[TensorMap]:
    module, path = f"{LAYER}.self_attn", "layers/*/self_attn"
    for ours, theirs in (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("o_proj", "out_proj")):
        yield from linear(f"{module}.{theirs}", f"{path}/{ours}")
    for ours, theirs in (("q_norm", "q_layernorm"), ("k_norm", "k_layernorm")):
        yield TensorMap(f"{module}.{theirs}.weight", f"{path}/{ours}/scale")


def read_conv(
    hf: Mapping[str, Any], family: type[ConvConfig], *, used: Iterable[str], must_equal: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of a ConvConfig. Raises ModelError as `read_sizes` does, and for layers of unknown types."""
    if hf.get("rms_norm_eps", hf["norm_eps"]) != hf["norm_eps"]:
        raise ModelError(f"rms_norm_eps of model_type {hf['model_type']!r} has no meaning: its norms have a norm_eps")
    hf = {**hf, "rms_norm_eps": hf["norm_eps"]}
    sizes = read_sizes(hf, family, used=used, must_equal=must_equal)
    count, numbers = hf["num_hidden_layers"], hf.get("full_attn_idxs")
    default = [FULL if numbers is None or number in numbers else CONV for number in range(count)]
    types = tuple(hf.get("layer_types") or default)
    if set(types) - {CONV, FULL} or len(types) != count:
        raise ModelError(
            f"layer_types must name {CONV} or {FULL} for each of num_hidden_layers={count} layers, got "
            f"{len(types)}: {', '.join(sorted(set(types)))}"
        )
    own = {name: hf[name] for name in ("conv_bias", "conv_L_cache")}
    return {**sizes, "rope": read_rope(hf, sizes["head_dim"]), "layer_types": types, **own}


@dataclass(frozen=True, kw_only=True)
class Config(ConvConfig):
    """Sizes under Hugging Face's names.

    block_auto_adjust_ff_dim: whether the feed-forward has two thirds of intermediate_size inner units, times
    block_ffn_dim_multiplier, rounded up to a multiple of block_multiple_of.
    """

    block_multiple_of: int
    block_ffn_dim_multiplier: float
    block_auto_adjust_ff_dim: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults({OLD_NAMES.get(name, name): value for name, value in _newest_last(hf)}, DEFAULTS)
        # What these describe is so in every model, and transformers does not read them.
        described = {
            "block_use_swiglu": True, "use_pos_enc": True, "block_dim": hf["hidden_size"],
            "conv_dim": hf["hidden_size"], "conv_dim_out": hf["hidden_size"], "block_norm_eps": hf["norm_eps"],
            "num_heads": hf["num_attention_heads"],
        }  # fmt: skip
        own = {name: hf[name] for name in OWN if name.startswith("block_")}
        config = cls(**read_conv(hf, cls, used=USED, must_equal=described), **own)
        if not 1 <= config.block_ffn_dim_multiplier * config.intermediate_size <= MOST_WIDTH:
            raise ModelError(
                f"block_ffn_dim_multiplier={config.block_ffn_dim_multiplier} of intermediate_size="
                f"{config.intermediate_size}: a feed-forward has from 1 to {MOST_WIDTH:,} inner units"
            )
        return config

    def to_hf(self) -> dict[str, Any]:
        return {"architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", **self.hf_fields()}

    def score_architecture(self) -> str:
        """See FamilyConfig."""
        raise no_reward_model("lfm2")

    def shape(self) -> DecoderShape:
        """Convolutions and attention, each before a feed-forward of the same size."""
        return self.layers([self.mlp(hidden=self._inner())] * self.num_hidden_layers)

    def _inner(self) -> int:
        if not self.block_auto_adjust_ff_dim:
            return self.intermediate_size
        inner, multiple = (
            int(self.block_ffn_dim_multiplier * int(2 * self.intermediate_size / 3)),
            self.block_multiple_of,
        )
        return -(-inner // multiple) * multiple


def _newest_last(hf: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The fields, those with older names last: they take precedence in transformers."""
    return sorted(hf.items(), key=lambda field: field[0] in OLD_NAMES)


class Model(Decoder):
    """An LFM2 of the given config."""
