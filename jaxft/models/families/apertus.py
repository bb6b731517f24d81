"""Apertus 8B, 70B: no gate, a learnt activation (xIELU), q and k norms (arXiv:2509.14233)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.models.family import LAYER, FamilyConfig, no_reward_model, read_rope, read_sizes, with_defaults
from jaxft.models.tensor_map import TensorMap
from jaxft.nn.block import BlockShape, NormNames
from jaxft.nn.decoder import Decoder, DecoderShape

MODEL_TYPES = ("apertus",)
DEFAULTS = {"max_position_embeddings": 65536, "rms_norm_eps": 1e-5, "rope_theta": 12e6, "attention_bias": False}
# Of a config.json without any.
ROPE = {
    "rope_type": "llama3", "rope_theta": 12e6, "factor": 8.0, "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
# transformers does not read the last two.
ONLY = {"hidden_act": "xielu", "qk_norm": True, "post_norm": False}
NORMS: NormNames = ("attention_layernorm", None, "feedforward_layernorm", None)


@dataclass(frozen=True, kw_only=True)
class Config(FamilyConfig):
    """Sizes under Hugging Face's names."""

    attention_bias: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        if not hf.get("rope_scaling") and not hf.get("rope_parameters"):
            hf["rope_parameters"] = ROPE
        sizes = read_sizes(hf, cls, must_equal=ONLY)
        return cls(**sizes, rope=read_rope(hf, sizes["head_dim"]), attention_bias=hf["attention_bias"])

    def to_hf(self) -> dict[str, Any]:
        fields = self.hf_fields()
        return {
            "architectures": ["ApertusForCausalLM"],
            "model_type": "apertus",
            "hidden_act": "xielu",
            **fields,
            # An absent rope_scaling would mean llama3.
            "rope_scaling": fields["rope_scaling"] or {"rope_type": "default"},
        }

    def score_architecture(self) -> str:
        raise no_reward_model("apertus")

    def shape(self) -> DecoderShape:
        """Pre-norm layers, all equal, with q and k norms of single heads."""
        bias = self.attention_bias
        attention = self.attention(qk_norm="head", bias=bias, output_bias=bias)
        return self.uniform(attention, self.mlp(activation="xielu", gated=False), norms=NORMS)

    def mlp_tensors(self, block: BlockShape) -> Iterable[TensorMap]:
        """The table's lines for a feed-forward layer and its activation."""
        yield from super().mlp_tensors(block)
        for name in ("alpha_p", "alpha_n", "beta", "eps"):
            yield TensorMap(f"{LAYER}.mlp.act_fn.{name}", f"layers/*/mlp/act_fn/{name}")


class Model(Decoder):
    """An Apertus of the given config."""
