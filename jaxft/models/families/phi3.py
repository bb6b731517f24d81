"""Phi-3 and Phi-4: fused projections, partial and long rotary embeddings (arXiv:2404.14219)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ModelError
from jaxft.models.family import FamilyConfig, check_window, read_rope, read_sizes, with_defaults
from jaxft.nn.attention.score_form import ScoreForm
from jaxft.nn.decoder import Decoder, DecoderShape

MODEL_TYPES = ("phi3",)
DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "sliding_window": None}


@dataclass(frozen=True, kw_only=True)
class Config(FamilyConfig):
    """Sizes under Hugging Face's names. sliding_window: tokens that each token sees, itself included; None for all."""

    sliding_window: int | None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        only = {
            "hidden_act": "silu", "attention_bias": False, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
            "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False,
        }  # fmt: skip
        used = ("partial_rotary_factor", "original_max_position_embeddings")
        sizes = read_sizes(hf, cls, used=used, must_equal=only)
        if hf["sliding_window"] is not None:
            check_window(hf["sliding_window"])
        rope = read_rope(_modern(hf), sizes["head_dim"], partial=True)
        if rope.kind not in ("default", "longrope"):
            raise ModelError(
                f"rope scaling {rope.kind!r} is not implemented for model_type 'phi3'; implemented: longrope"
            )
        return cls(**sizes, rope=rope, sliding_window=hf["sliding_window"])

    def to_hf(self) -> dict[str, Any]:
        fields = self.hf_fields()
        if self.rope.kind == "longrope":
            # transformers reads the length outside the scaling, and takes its own default if it is absent there.
            scaling = dict(fields["rope_scaling"])
            fields["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
            # transformers 4 wants three fields exactly, one of which is `type`.
            fields["rope_scaling"] = {"type": scaling.pop("rope_type")} | scaling
        return {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "hidden_act": "silu",
            **fields,
        }

    def shape(self) -> DecoderShape:
        """Pre-norm layers, all equal, with qkv_proj and gate_up_proj."""
        attention = self.attention(form=ScoreForm(window=self.sliding_window), fused=True)
        return self.uniform(attention, self.mlp(fused=True))


def _modern(hf: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with longrope under its present name: it was first called `su`, and some files call it `yarn`."""
    hf = dict(hf)
    for field in ("rope_scaling", "rope_parameters"):
        scaling = dict(hf.get(field) or {})
        kind = scaling.pop("rope_type", scaling.pop("type", None))
        scaling.pop("type", None)
        if kind is not None:
            hf[field] = scaling | {"rope_type": "longrope" if kind in ("su", "yarn") else kind}
    hf.setdefault("original_max_position_embeddings", DEFAULTS["max_position_embeddings"])
    return hf


class Model(Decoder):
    """A Phi-3 of the given config."""
