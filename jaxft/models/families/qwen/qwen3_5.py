"""Qwen3.5 and 3.6, dense: three layers with a gated delta-net to each one with gated attention (arXiv:2412.06464)."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ModelError
from jaxft.models.family import FULL, LAYER, FamilyConfig, read_layer_types, read_rope, read_sizes, with_defaults
from jaxft.models.tensor_map import DEPTHWISE, TensorMap, linear
from jaxft.nn.attention.shape import AttentionShape
from jaxft.nn.block import BlockShape
from jaxft.nn.decoder import Decoder, DecoderShape
from jaxft.nn.experts.layer import MoEShape
from jaxft.nn.mlp import MLPShape
from jaxft.nn.norm import NormShape
from jaxft.nn.recurrent.delta_net import DeltaNetShape

MODEL_TYPES = ("qwen3_5_text",)
LINEAR = "linear_attention"  # a value of Hugging Face's layer_types
# For all families with delta-nets; those of single families are beside.
SHARED_DEFAULTS = {
    "head_dim": 256, "attention_bias": False, "max_position_embeddings": 32768, "partial_rotary_factor": 0.25,
    "full_attention_interval": 4, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
}  # fmt: skip
DEFAULTS = SHARED_DEFAULTS | {"num_key_value_heads": 4, "intermediate_size": 12288}
ONLY = {"hidden_act": "silu", "attn_output_gate": True, "mamba_ssm_dtype": "float32", "use_qk_norm": True}
# Layers that predict several tokens at once have fields too; they are left out.
PREDICTION_FIELDS = ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
USED = ("full_attention_interval", "partial_rotary_factor", *PREDICTION_FIELDS)
OWN = ("attention_bias", "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim",
       "linear_num_key_heads", "linear_num_value_heads")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DeltaNetConfig(FamilyConfig):
    """What the families with delta-nets share. layer_types: LINEAR or FULL for each layer."""

    attention_bias: bool
    layer_types: tuple[str, ...]
    linear_conv_kernel_dim: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int

    def is_for_prediction(self, name: str) -> bool:
        """See FamilyConfig: files have these layers beside the model."""
        return name.startswith("mtp.")

    def by_layer_type(self, feed_forwards: Iterable[MLPShape | MoEShape], *, grouped: bool = False) -> DecoderShape:
        """Pre-norm layers whose norms have an offset. feed_forwards: one a layer. grouped: of DeltaNetShape."""
        norm, bias = NormShape(eps=self.rms_norm_eps, plus_one=True), self.attention_bias
        mixers: dict[str, AttentionShape | DeltaNetShape] = {
            FULL: self.attention(qk_norm="head", bias=bias, output_bias=bias, gated=True),
            LINEAR: DeltaNetShape(
                width=self.hidden_size,
                key_heads=self.linear_num_key_heads,
                value_heads=self.linear_num_value_heads,
                key_dim=self.linear_key_head_dim,
                value_dim=self.linear_value_head_dim,
                taps=self.linear_conv_kernel_dim,
                grouped=grouped,
            ),
        }
        layers = zip(self.layer_types, feed_forwards, strict=True)
        blocks = tuple(BlockShape(mixer=mixers[kind], mlp=mlp, norm=norm) for kind, mlp in layers)
        return DecoderShape(layers=blocks, ropes=(self.rope,), norm=norm)

    def mixer_tensors(self, block: BlockShape) -> Iterable[TensorMap]:
        """See FamilyConfig."""
        return (
            delta_net_tensors(block.mixer) if isinstance(block.mixer, DeltaNetShape) else super().mixer_tensors(block)
        )


def delta_net_tensors(shape: DeltaNetShape) -> Iterator[TensorMap]:
    """The table's lines for a layer with a delta-net."""
    module, path = f"{LAYER}.linear_attn", "layers/*/linear_attn"
    split = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
    for name in (*(("in_proj_qkvz", "in_proj_ba") if shape.grouped else split), "out_proj"):
        yield from linear(f"{module}.{name}", f"{path}/{name}")
    yield TensorMap(f"{module}.conv1d.weight", f"{path}/conv1d/taps", DEPTHWISE)
    yield TensorMap(f"{module}.norm.weight", f"{path}/norm/scale")
    yield from (TensorMap(f"{module}.{name}", f"{path}/{name}") for name in ("A_log", "dt_bias"))


def read_delta_net(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that DeltaNetConfig adds. Raises ModelError if value heads are no multiple of key heads."""
    values, keys = hf["linear_num_value_heads"], hf["linear_num_key_heads"]
    if values % keys:
        raise ModelError(f"linear_num_value_heads={values} is not a multiple of linear_num_key_heads={keys}")
    period = hf["full_attention_interval"]
    default = [LINEAR if (i + 1) % period else FULL for i in range(hf["num_hidden_layers"])]
    types = read_layer_types(hf, default, known=(LINEAR, FULL))
    return {"layer_types": types, **{name: hf[name] for name in OWN}}


@dataclass(frozen=True, kw_only=True)
class Config(DeltaNetConfig):
    """Sizes under Hugging Face's names."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        sizes = read_sizes(hf, cls, used=USED, must_equal=ONLY)
        return cls(**sizes, rope=read_rope(hf, sizes["head_dim"], partial=True), **read_delta_net(hf))

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["Qwen3_5ForCausalLM"],
            "model_type": "qwen3_5_text",
            "hidden_act": "silu",
            **self.hf_fields(),
        }

    def score_architecture(self) -> str:
        """The class for text alone; the one without `Text` in its name takes images too."""
        return "Qwen3_5TextForSequenceClassification"

    def shape(self) -> DecoderShape:
        """Delta-nets and gated attention in the order of `layer_types`."""
        return self.by_layer_type([self.mlp()] * self.num_hidden_layers)


class Model(Decoder):
    """A Qwen3.5 of the given config."""
