"""OLMo 3: OLMo 2 with three local layers per global layer, each kind with its own rope (arXiv:2512.13961)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ModelError
from jaxft.models.family import (
    FULL,
    SLIDING,
    FamilyConfig,
    check_window,
    read_layer_types,
    read_rope,
    read_sizes,
    ropes_by_kind,
    with_defaults,
)
from jaxft.nn.attention.rope import Rope
from jaxft.nn.attention.score_form import ScoreForm
from jaxft.nn.block import AFTER, BlockShape
from jaxft.nn.decoder import Decoder, DecoderShape
from jaxft.nn.norm import NormShape

MODEL_TYPES = ("olmo3",)
THETA = 500000.0
DEFAULTS = {
    "rms_norm_eps": 1e-5, "attention_bias": False, "sliding_window": 4096, "max_position_embeddings": 2048,
    "rope_theta": THETA,
}  # fmt: skip
PERIOD = 4  # by default every fourth layer is global


@dataclass(frozen=True, kw_only=True)
class Config(FamilyConfig):
    """Sizes under Hugging Face's names. rope: of global layers. local_rope: of those with a window."""

    attention_bias: bool
    sliding_window: int | None
    layer_types: tuple[str, ...]
    local_rope: Rope

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        sizes = read_sizes(hf, cls, must_equal={"hidden_act": "silu", "use_qk_norm": True})
        theta = hf["rope_theta"]
        if theta != THETA and SLIDING not in (hf.get("rope_parameters") or {}):
            raise ModelError(
                f"rope_theta={theta} of model_type 'olmo3' is ambiguous: transformers 4 uses it for local layers too, "
                f"but transformers 5 uses {THETA}. Give rope_parameters with a rope_theta for {SLIDING} and for {FULL}."
            )
        rope, local = (read_rope(part, sizes["head_dim"]) for part in ropes_by_kind(hf, {FULL: theta, SLIDING: theta}))
        types = read_layer_types(hf, [SLIDING if (i + 1) % PERIOD else FULL for i in range(hf["num_hidden_layers"])])
        if SLIDING in types:
            check_window(hf["sliding_window"])
        own = {name: hf[name] for name in ("attention_bias", "sliding_window")}
        return cls(**sizes, **own, rope=rope, local_rope=local, layer_types=types)

    def to_hf(self) -> dict[str, Any]:
        """The same as `config.json`, in both dialects: rope_parameters is of transformers 5 alone."""
        return {
            "architectures": ["Olmo3ForCausalLM"],
            "model_type": "olmo3",
            "hidden_act": "silu",
            **self.hf_fields(),
            "rope_parameters": {FULL: self.rope.to_parameters(), SLIDING: self.local_rope.to_parameters()},
        }

    def shape(self) -> DecoderShape:
        """Post-norm layers of both kinds, with q and k norms over the whole projection."""
        norm, bias = NormShape(eps=self.rms_norm_eps), self.attention_bias
        ropes = {SLIDING: self.local_rope, FULL: self.rope}
        distinct = tuple(dict.fromkeys(ropes.values()))
        blocks = {
            kind: BlockShape(
                mixer=self.attention(
                    form=ScoreForm(window=window),
                    qk_norm="whole",
                    bias=bias,
                    output_bias=bias,
                    rope=distinct.index(ropes[kind]),
                ),
                mlp=self.mlp(),
                norm=norm,
                norms=AFTER,
            )
            for kind, window in ((SLIDING, self.sliding_window), (FULL, None))
        }
        return DecoderShape(layers=tuple(blocks[kind] for kind in self.layer_types), ropes=distinct, norm=norm)


class Model(Decoder):
    """An OLMo 3 of the given config."""
