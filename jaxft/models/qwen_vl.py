"""Text models of Qwen2.5-VL and Qwen3-VL: of text they compute what the plain families do, under other defaults."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ModelError
from jaxft.nn.attention.rope import MULTIMODAL_FIELDS


@dataclass(frozen=True, kw_only=True)
class PlainFamily:
    """The family that computes the same of text. defaults: of fields that a text_config leaves out.

    always: fields that the text model does not read, and their only values that the family has the same result for.
    """

    model_type: str
    defaults: Mapping[str, Any]
    always: Mapping[str, Any]


PLAIN = {
    "qwen2_5_vl_text": PlainFamily(
        model_type="qwen2",
        defaults={
            "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_window_layers": 80,
        },
        always={},
    ),
    "qwen3_vl_text": PlainFamily(
        model_type="qwen3",
        defaults={
            "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 128000,
            "rope_theta": 5e5,
        },
        always={"use_sliding_window": False},
    ),
    "qwen3_vl_moe_text": PlainFamily(
        model_type="qwen3_moe",
        defaults={
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
            "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 128000,
            "rope_theta": 5e5, "moe_intermediate_size": 1408, "num_experts_per_tok": 4,
        },
        always={"use_sliding_window": False, "norm_topk_prob": True},
    ),
}  # fmt: skip


def as_plain(text: Mapping[str, Any]) -> dict[str, Any]:
    """A text_config as that of the plain family, without what positions images; any other text_config itself.

    Raises ModelError for a field with a value that the text model would not read.
    """
    plain = PLAIN.get(str(text.get("model_type")))
    if plain is None:
        return dict(text)
    for name, value in plain.always.items():
        if text.get(name, value) not in (value, None):
            raise ModelError(f"text_config: {name}={text[name]!r} (only {value!r} is implemented)")
    given = {name: value for name, value in text.items() if value is not None or name not in plain.defaults}
    fields = {**plain.defaults, **given, **plain.always, "model_type": plain.model_type}
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(fields.get(name), Mapping):
            fields[name] = _of_text(fields[name])
    return fields


def _of_text(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a rope for tokens whose position is one number."""
    fields = {name: value for name, value in rope.items() if name not in MULTIMODAL_FIELDS}
    return fields | {name: "default" for name in ("type", "rope_type") if fields.get(name) == "mrope"}
