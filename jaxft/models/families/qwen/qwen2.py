"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values (arXiv:2412.15115)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.models.family import (
    FULL,
    SLIDING,
    FamilyConfig,
    check_window,
    read_layer_types,
    read_rope,
    read_sizes,
    with_defaults,
)
from jaxft.nn.attention.score_form import ScoreForm
from jaxft.nn.block import BlockShape
from jaxft.nn.decoder import Decoder, DecoderShape
from jaxft.nn.norm import NormShape

MODEL_TYPES = ("qwen2",)
# Queries, keys and values always have biases here, whatever these fields are called.
ONLY = {"hidden_act": "silu", "use_mrope": False, "attention_bias": True, "qkv_bias": True}
DEFAULTS = {
    "num_key_value_heads": 32, "max_position_embeddings": 32768, "use_sliding_window": False,
    "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WindowedConfig(FamilyConfig):
    """What Qwen2 and Qwen3 share. sliding_window: of the SLIDING layers in layer_types; None if there are none."""

    sliding_window: int | None
    layer_types: tuple[str, ...]

    def hf_fields(self) -> dict[str, Any]:
        windowed = SLIDING in self.layer_types
        # transformers 4 reads max_window_layers: how many of the first layers have full attention.
        first = self.layer_types.index(SLIDING) if windowed else self.num_hidden_layers
        return super().hf_fields() | {"use_sliding_window": windowed, "max_window_layers": first}

    def by_layer_type(self, **attention: Any) -> DecoderShape:
        """Pre-norm layers that differ only in their windows. attention: options of FamilyConfig.attention."""
        norm, mlp = NormShape(eps=self.rms_norm_eps), self.mlp()
        blocks = {
            kind: BlockShape(mixer=self.attention(form=ScoreForm(window=window), **attention), mlp=mlp, norm=norm)
            for kind, window in ((SLIDING, self.sliding_window), (FULL, None))
        }
        return DecoderShape(layers=tuple(blocks[kind] for kind in self.layer_types), ropes=(self.rope,), norm=norm)


def read_windows(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of WindowedConfig, derived as in transformers. Raises ModelError for inconsistent ones."""
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    first = hf["max_window_layers"]
    default = [SLIDING if window is not None and i >= first else FULL for i in range(hf["num_hidden_layers"])]
    types = read_layer_types(hf, default)
    if SLIDING in types:
        check_window(window)
    return {"sliding_window": window if SLIDING in types else None, "layer_types": types}


@dataclass(frozen=True, kw_only=True)
class Config(WindowedConfig):
    """Sizes under Hugging Face's names."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        used = ("use_sliding_window", "max_window_layers")
        sizes = read_sizes(hf, cls, used=used, must_equal=ONLY)
        return cls(**sizes, rope=read_rope(hf, sizes["head_dim"]), **read_windows(hf))

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_act": "silu",
            **self.hf_fields(),
        }

    def shape(self) -> DecoderShape:
        """Pre-norm layers; all but the output projection of attention have biases."""
        return self.by_layer_type(bias=True)


class Model(Decoder):
    """A Qwen2 of the given config."""
