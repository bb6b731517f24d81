"""EXAONE 4.0: norms after each part; where local layers exist, only they encode positions (arXiv:2507.11407)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.models.family import (
    FULL,
    SLIDING,
    FamilyConfig,
    check_window,
    read_periodic_types,
    read_rope,
    read_sizes,
    with_defaults,
)
from jaxft.nn.attention.score_form import ScoreForm
from jaxft.nn.block import AFTER, BlockShape
from jaxft.nn.decoder import Decoder, DecoderShape
from jaxft.nn.norm import NormShape

MODEL_TYPES = ("exaone4",)
DEFAULTS = {
    "num_key_value_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "sliding_window": 4096,
}  # fmt: skip
PERIOD = 4  # by default every fourth layer is global


@dataclass(frozen=True, kw_only=True)
class Config(FamilyConfig):
    """Sizes under Hugging Face's names. sliding_window: of SLIDING layers; if None, all layers are global, with ropes.

    If it is a number, global layers have no rope.
    """

    sliding_window: int | None
    layer_types: tuple[str, ...]

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        used = ("sliding_window_pattern",)
        sizes = read_sizes(hf, cls, used=used, must_equal={"hidden_act": "silu", "use_qk_norm": True})
        window = hf["sliding_window"]
        if window is None:  # then transformers takes no notice of the pattern
            hf["sliding_window_pattern"] = 1
        types = read_periodic_types(hf, PERIOD)
        if window is not None or SLIDING in types:
            check_window(window)
        return cls(**sizes, rope=read_rope(hf, sizes["head_dim"]), sliding_window=window, layer_types=types)

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["Exaone4ForCausalLM"],
            "model_type": "exaone4",
            "hidden_act": "silu",
            **self.hf_fields(),
        }

    def shape(self) -> DecoderShape:
        """Post-norm layers with q and k norms of single heads."""
        norm, mlp = NormShape(eps=self.rms_norm_eps), self.mlp()
        forms = {
            SLIDING: (ScoreForm(window=self.sliding_window), 0),
            FULL: (ScoreForm(), 0 if self.sliding_window is None else None),
        }
        blocks = {
            kind: BlockShape(
                mixer=self.attention(form=form, rope=rope, qk_norm="head"), mlp=mlp, norm=norm, norms=AFTER
            )
            for kind, (form, rope) in forms.items()
        }
        return DecoderShape(layers=tuple(blocks[kind] for kind in self.layer_types), ropes=(self.rope,), norm=norm)


class Model(Decoder):
    """An EXAONE 4.0 of the given config."""
