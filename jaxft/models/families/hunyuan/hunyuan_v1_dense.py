"""Hunyuan 0.5B, 1.8B, 4B, 7B: q and k norms after the rotation, and a rope stretched by a fixed alpha."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxft.models.family import LAYER, FamilyConfig, read_rope, read_sizes, with_defaults
from jaxft.models.tensor_map import TensorMap
from jaxft.nn.block import BlockShape
from jaxft.nn.decoder import Decoder, DecoderShape

MODEL_TYPES = ("hunyuan_v1_dense",)
DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "attention_bias": False}
# transformers reads none of these; other values are those of models that it does not implement.
ONLY = {
    "hidden_act": "silu", "use_qk_norm": True, "use_cla": False, "norm_type": "rms", "position_embedding_xdrope": False,
    "use_mla": False, "use_rotary_pos_emb": True, "num_experts": 1, "add_classification_head": False,
    "anyres_vit_max_image_size": None, "kv_lora_rank": None, "q_lora_rank": None,
}  # fmt: skip
UNUSED = (
    "attention_head_dim", "cla_share_factor", "class_num", "dense_list", "eod_token_id", "im_end_id", "im_newline_id",
    "im_start_id", "image_token_id", "mask_init_id", "org_vocab_size", "pad_id", "pool_type", "sep_id", "text_end_id",
    "text_start_id", "eos_id", "bos_id",
)  # fmt: skip
# Fields of other scalings, which files have beside alpha.
OTHER_SCALINGS = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
# Our names of the norms, and those in files.
NORMS = {"q_norm": "query_layernorm", "k_norm": "key_layernorm"}


@dataclass(frozen=True, kw_only=True)
class Config(FamilyConfig):
    """Sizes under Hugging Face's names."""

    attention_bias: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = plain_alpha(with_defaults(hf, DEFAULTS))
        sizes = read_sizes(hf, cls, used=UNUSED, must_equal=ONLY)
        rope = read_rope(hf, sizes["head_dim"], alpha=True)
        return cls(**sizes, rope=rope, attention_bias=hf["attention_bias"])

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["HunYuanDenseV1ForCausalLM"],
            "model_type": "hunyuan_v1_dense",
            "hidden_act": "silu",
            **self.hf_fields(),
        }

    def shape(self) -> DecoderShape:
        """Pre-norm layers, all equal."""
        bias = self.attention_bias
        attention = self.attention(qk_norm="head", normed_after_rope=True, bias=bias, output_bias=bias)
        return self.uniform(attention, self.mlp())

    def mixer_tensors(self, block: BlockShape) -> Iterable[TensorMap]:
        """The table's lines for an attention layer."""
        return normed_after_rope_tensors(super().mixer_tensors(block))


def normed_after_rope_tensors(lines: Iterable[TensorMap]) -> Iterator[TensorMap]:
    """The lines of an attention layer with Hunyuan's names of the norms."""
    for line in lines:
        name = line.path.split("/")[3]
        yield line if name not in NORMS else replace(line, hf=f"{LAYER}.self_attn.{NORMS[name]}.weight")


class Model(Decoder):
    """A Hunyuan without experts of the given config."""


def plain_alpha(hf: dict[str, Any]) -> dict[str, Any]:
    """config.json whose scaling by alpha has no fields of other scalings."""
    for field in ("rope_scaling", "rope_parameters"):
        scaling = hf.get(field)
        if isinstance(scaling, Mapping) and scaling.get("alpha"):
            hf[field] = {name: value for name, value in scaling.items() if name not in OTHER_SCALINGS}
    return hf
