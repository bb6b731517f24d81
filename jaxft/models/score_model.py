"""Reward models in Hugging Face's form: `*ForSequenceClassification` with one label."""

from collections.abc import Mapping
from typing import Any

from jaxft.errors import ModelError

LANGUAGE_MODEL, SCORE_MODEL = "ForCausalLM", "ForSequenceClassification"
# transformers writes no names of labels for two of them, its default.
DEFAULT_LABELS = 2


def is_score_model(hf: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a model with a score head in place of the LM head.

    Raises ModelError if it has more than one label: a classifier is no reward model.
    """
    name = (hf.get("architectures") or [""])[0]
    if not name.endswith(SCORE_MODEL):
        return False
    labels = hf.get("num_labels") or len(hf.get("id2label") or ()) or DEFAULT_LABELS
    if labels != 1:
        raise ModelError(
            f"the model is a {name} with {labels} labels, a classifier. Only one label is implemented: a reward model, "
            "whose config.json has one entry in id2label."
        )
    return True


def as_score_model(hf: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """config.json of the reward model that a language model becomes. architecture: the class in transformers."""
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    kept = {name: value for name, value in hf.items() if name not in ("num_labels", "problem_type")}
    return kept | {"architectures": [architecture]} | labels
