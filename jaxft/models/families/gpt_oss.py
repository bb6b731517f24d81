"""gpt-oss 20B and 120B: experts with biases, attention with sinks, windows on every other layer (arXiv:2508.10925)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ModelError
from jaxft.models.family import FULL, SLIDING, check_window, read_layer_types, read_rope, read_sizes, with_defaults
from jaxft.models.hf_fields import require
from jaxft.models.moe import MUST_EQUAL, PATH, MoEConfig, check_experts
from jaxft.models.tensor_map import TensorMap, linear
from jaxft.nn.attention.score_form import ScoreForm
from jaxft.nn.block import BlockShape
from jaxft.nn.decoder import Decoder, DecoderShape
from jaxft.nn.experts.layer import MoEShape
from jaxft.nn.mlp import ClampedSwiGLU
from jaxft.nn.norm import NormShape

MODEL_TYPES = ("gpt_oss",)
DEFAULTS = {
    "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "sliding_window": 128, "attention_bias": True, "num_local_experts": 128, "num_experts_per_tok": 4,
    "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "router_aux_loss_coef": 0.001, "rope_theta": 150000.0,
    "output_router_logits": False,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
# The layers that packed files leave out are known from their tensors; dequantize is done in any case.
PACKING_FIELDS = {"quant_method", "modules_to_not_convert", "dequantize"}
OWN = ("attention_bias", "num_local_experts", "num_experts_per_tok", "swiglu_alpha", "swiglu_limit",
       "router_aux_loss_coef", "output_router_logits")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config(MoEConfig):
    """Sizes under Hugging Face's names. intermediate_size: of one expert. sliding_window: of the layers of that type.

    A quantization_config of MXFP4 describes how files store the experts, not the network, so it is not a field.
    """

    layer_types: tuple[str, ...]
    attention_bias: bool
    num_local_experts: int
    swiglu_alpha: float
    swiglu_limit: float

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        if not hf.get("rope_scaling") and not hf.get("rope_parameters"):
            hf["rope_scaling"] = YARN
        require(hf, ["head_dim"])
        rope = read_rope(hf, hf["head_dim"])
        # Older names, which transformers does not read.
        aliases = {
            "experts_per_token": hf["num_experts_per_tok"],
            "num_experts": hf["num_local_experts"],
            "initial_context_length": rope.original_max_position_embeddings,
        }
        sizes = read_sizes(hf, cls, used=["quantization_config"], must_equal=MUST_EQUAL | aliases)
        _check_packing(hf.get("quantization_config"))
        check_experts(hf, hf["num_local_experts"])
        layers = range(hf["num_hidden_layers"])
        types = read_layer_types(hf, [FULL if i % 2 else SLIDING for i in layers])
        if SLIDING in types:
            check_window(hf["sliding_window"])
        own = {name: hf[name] for name in OWN}
        return cls(**sizes, rope=rope, layer_types=types, sliding_window=hf["sliding_window"], **own)

    def to_hf(self) -> dict[str, Any]:
        fields = self.hf_fields()
        return {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "hidden_act": "silu",
            **fields,
            # An absent rope_scaling would mean yarn.
            "rope_scaling": fields["rope_scaling"] or {"rope_type": "default"},
        }

    def shape(self) -> DecoderShape:
        """Pre-norm layers, with and without a window in the order of `layer_types`."""
        norm = NormShape(eps=self.rms_norm_eps)
        experts = self.experts(
            self.num_local_experts,
            self.intermediate_size,
            self.router(renormalize=True, use_bias=True),
            activation=ClampedSwiGLU(alpha=self.swiglu_alpha, limit=self.swiglu_limit),
            fused="alternating",
            use_bias=True,
        )
        bias = self.attention_bias
        blocks = {
            kind: BlockShape(
                mixer=self.attention(form=ScoreForm(window=window), bias=bias, output_bias=bias, sinks=True),
                mlp=experts,
                norm=norm,
            )
            for kind, window in ((SLIDING, self.sliding_window), (FULL, None))
        }
        return DecoderShape(layers=tuple(blocks[kind] for kind in self.layer_types), ropes=(self.rope,), norm=norm)

    def moe_tensors(self, experts: MoEShape) -> Iterable[TensorMap]:
        """The table's lines for a layer of experts. Files store all experts in one tensor, inputs first, as we do."""
        module = "model.layers.{i}.mlp"
        return (
            *linear(f"{module}.router", f"{PATH}/router", bias=True),
            *(
                TensorMap(f"{module}.experts.{name}{suffix}", f"{PATH}/{name}/{part}")
                for name in ("gate_up_proj", "down_proj")
                for suffix, part in (("", "kernel"), ("_bias", "bias"))
            ),
        )


class Model(Decoder):
    """A gpt-oss of the given config."""


def _check_packing(given: Mapping[str, Any] | None) -> None:
    if given is None:
        return
    if not isinstance(given, Mapping) or given.get("quant_method") != "mxfp4" or set(given) - PACKING_FIELDS:
        raise ModelError(
            f"quantization_config={given!r} is not implemented for model_type 'gpt_oss': only quant_method 'mxfp4' is, "
            f"with no other fields than {', '.join(sorted(PACKING_FIELDS - {'quant_method'}))}. Download the model "
            "unquantised, or in MXFP4 as its authors publish it."
        )
