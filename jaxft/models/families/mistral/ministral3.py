"""Ministral 3, text: Mistral with yarn and queries scaled by their position (arXiv:2601.08584)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ModelError
from jaxft.models.families.mistral import mistral
from jaxft.models.family import check_window, read_rope, read_sizes, with_defaults
from jaxft.nn.decoder import Decoder

MODEL_TYPES = ("ministral3",)
DEFAULTS = {
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144, "rms_norm_eps": 1e-5,
    "sliding_window": None,
}  # fmt: skip
ROPE = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config(mistral.Config):
    """Sizes under Hugging Face's names."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads `config.json` of transformers 5. Raises ModelError for fields it does not implement."""
        hf = with_defaults(hf, DEFAULTS)
        given = hf.get("rope_parameters") or hf.get("rope_scaling") or ROPE
        # transformers writes the model's own length among them but does not read it there.
        hf["rope_parameters"] = {k: v for k, v in given.items() if k != "max_position_embeddings"}
        sizes = read_sizes(hf, cls, must_equal={"hidden_act": "silu"})
        rope = read_rope(hf, sizes["head_dim"], scaled_queries=True)
        if rope.kind != "yarn" or rope.llama_4_scaling_beta is None:
            raise ModelError(
                f"rope_parameters of model_type 'ministral3' are rope_type={rope.kind!r} with llama_4_scaling_beta="
                f"{rope.llama_4_scaling_beta}; implemented: yarn with a number for it"
            )
        if hf["sliding_window"] is not None:
            check_window(hf["sliding_window"])
        return cls(**sizes, rope=rope, sliding_window=hf["sliding_window"])

    def to_hf(self) -> dict[str, Any]:
        """The same as `config.json` of transformers 5, the first to know this family."""
        fields = {name: value for name, value in self.hf_fields().items() if name not in ("rope_theta", "rope_scaling")}
        return {
            "architectures": ["Ministral3ForCausalLM"],
            "model_type": "ministral3",
            "hidden_act": "silu",
            **fields,
            "rope_parameters": self.rope.to_parameters(),
        }


class Model(Decoder):
    """A Ministral 3 of the given config."""
