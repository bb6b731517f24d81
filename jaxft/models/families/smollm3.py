"""SmolLM3: Llama whose every fourth layer does not encode positions (arXiv:2501.18795)."""

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
    with_defaults,
)
from jaxft.nn.attention.score_form import ScoreForm
from jaxft.nn.block import BlockShape
from jaxft.nn.decoder import Decoder, DecoderShape
from jaxft.nn.norm import NormShape

MODEL_TYPES = ("smollm3",)
DEFAULTS = {
    "num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2e6, "attention_bias": False,
    "mlp_bias": False, "tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": None,
}  # fmt: skip
PERIOD = 4  # by default every fourth layer has no rope


@dataclass(frozen=True, kw_only=True)
class Config(FamilyConfig):
    """Sizes under Hugging Face's names. no_rope_layers: 1 for a layer with a rope, 0 for one without.

    sliding_window: of the SLIDING layers in layer_types; None if there are none.
    """

    attention_bias: bool
    mlp_bias: bool
    no_rope_layers: tuple[int, ...]
    sliding_window: int | None
    layer_types: tuple[str, ...]

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        used = ("no_rope_layer_interval", "use_sliding_window", "max_window_layers")
        sizes = read_sizes(hf, cls, used=used, must_equal={"hidden_act": "silu"})
        ropes = read_ropes(hf)
        window = hf["sliding_window"] if hf["use_sliding_window"] else None
        types = read_layer_types(hf, [FULL if rope or window is None else SLIDING for rope in ropes])
        if SLIDING in types:
            check_window(window)
        return cls(
            **sizes,
            rope=read_rope(hf, sizes["head_dim"]),
            attention_bias=hf["attention_bias"],
            mlp_bias=hf["mlp_bias"],
            no_rope_layers=ropes,
            sliding_window=window if SLIDING in types else None,
            layer_types=types,
        )

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["SmolLM3ForCausalLM"],
            "model_type": "smollm3",
            "hidden_act": "silu",
            "use_sliding_window": self.sliding_window is not None,
            **self.hf_fields(),
        }

    def shape(self) -> DecoderShape:
        """Pre-norm layers with and without a rope."""
        norm, mlp, bias = NormShape(eps=self.rms_norm_eps), self.mlp(bias=self.mlp_bias), self.attention_bias
        layers = tuple(
            BlockShape(
                mixer=self.attention(
                    form=ScoreForm(window=self.sliding_window if kind == SLIDING else None),
                    bias=bias,
                    output_bias=bias,
                    rope=0 if has_rope else None,
                ),
                mlp=mlp,
                norm=norm,
            )
            for has_rope, kind in zip(self.no_rope_layers, self.layer_types, strict=True)
        )
        return DecoderShape(layers=layers, ropes=(self.rope,), norm=norm)


class Model(Decoder):
    """A SmolLM3 of the given config."""


def default_ropes(layers: int, period: int = PERIOD) -> tuple[int, ...]:
    """`no_rope_layers` of a model in which every period-th layer has no rope."""
    return tuple(int((i + 1) % period != 0) for i in range(layers))


def read_ropes(hf: Mapping[str, Any]) -> tuple[int, ...]:
    """`no_rope_layers`, or the default if absent. Raises ModelError for a list that does not name every layer."""
    count, given = hf["num_hidden_layers"], hf.get("no_rope_layers")
    if given is None:
        return default_ropes(count, hf.get("no_rope_layer_interval") or PERIOD)
    if len(given) < count or set(given) - {0, 1}:
        raise ModelError(
            f"no_rope_layers must have a 1 (a rope) or 0 (none) for each of num_hidden_layers={count} layers, got "
            f"{given!r}"
        )
    return tuple(given[:count])
