"""The kinds of the values that a GGUF header must have under the keys that jaxft reads."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxft.files.json_fields import (
    COUNT,
    FLAG,
    NUMBER,
    POSITIVE,
    TEXT,
    TEXTS,
    WHOLE,
    FieldKind,
    check_kinds,
)

NUMBERS = FieldKind(text="a list of numbers", fits=lambda value: isinstance(value, np.ndarray))
NOTHING = FieldKind(text="empty", fits=lambda value: isinstance(value, np.ndarray) and not len(value))
NAMES = TEXTS | NOTHING  # an empty list has some type in the file
TOKEN = "tokenizer.ggml"
KINDS: dict[str, FieldKind] = {
    **dict.fromkeys(("general.architecture", f"{TOKEN}.model", f"{TOKEN}.pre", "tokenizer.chat_template"), TEXT),
    **dict.fromkeys((f"{TOKEN}.tokens", f"{TOKEN}.merges", "tokenizer.chat_templates"), NAMES),
    **dict.fromkeys((f"{TOKEN}.token_type", f"{TOKEN}.scores"), NUMBERS),
    **dict.fromkeys(
        (f"{TOKEN}.{name}_token_id" for name in ("bos", "eos", "eot", "eom", "unknown", "padding")), WHOLE
    ),
    **dict.fromkeys(
        (f"{TOKEN}.{name}" for name in (
            "add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces",
        )), FLAG
    ),
}  # fmt: skip
# Keys under the name of the architecture. Sizes are checked where they are read.
OF_ARCHITECTURE: dict[str, FieldKind] = {
    "rope.scaling.type": TEXT,
    "rope.scaling.original_context_length": COUNT,
    "attention.sliding_window": WHOLE,
    "attention.sliding_window_pattern": COUNT | NUMBERS,
    **dict.fromkeys(
        (
            "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.freq_base_swa", "rope.scaling.factor",
            "rope.scaling.attn_factor",
        ),
        POSITIVE,
    ),
    **dict.fromkeys(
        (
            "attn_logit_softcapping", "final_logit_softcapping", "attention.temperature_scale",
            "rope.scaling.yarn_log_multiplier",
        ),
        NUMBER,
    ),
}  # fmt: skip


def check_metadata(metadata: Mapping[str, Any], path: str) -> None:
    """Raises ModelError naming the first key whose value is of another kind than readers can use."""
    check_kinds(metadata, KINDS, path)
    arch = metadata.get("general.architecture")
    check_kinds(metadata, {f"{arch}.{name}": kind for name, kind in OF_ARCHITECTURE.items()}, path)
    templates = metadata.get("tokenizer.chat_templates")
    names = templates if isinstance(templates, list) else []
    check_kinds(metadata, {f"tokenizer.chat_template.{name}": TEXT for name in names}, path)
