"""The rope of what is written is read alike from the fields of transformers 4, those of transformers 5, and both."""

import json

import pytest

from jaxft import models
from jaxft.assets import ASSETS
from jaxft.checkpoint.hf import write_config
from jaxft.models.family import ROPE_DIALECTS

PUBLISHED = sorted((ASSETS / "published").glob("*.json"))
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
}  # fmt: skip
# transformers 4 does not have these, or has no fields for both of their ropes.
OF_5_ONLY = ("ministral3", "olmo3", "gemma4_text", "gemma4_unified_text")


def written(config, tmp_path):
    write_config(str(tmp_path), config, dtype="float32")
    return json.loads((tmp_path / "config.json").read_text())


def ropes(config):
    transformers = pytest.importorskip("transformers")
    fields = {name: value for name, value in config.items() if name not in ("torch_dtype", "architectures")}
    fields = json.loads(json.dumps(fields))  # transformers changes the nested ones
    rope = transformers.AutoConfig.for_model(**fields).to_dict()["rope_parameters"]
    by_kind = rope if any(isinstance(value, dict) for value in rope.values()) else {"": rope}
    # Both say the same by its absence, or nothing that is read.
    silent = {"type": None, "truncate": True, "max_position_embeddings": config["max_position_embeddings"]}
    # Hunyuan's files name fields of yarn, which a dynamic rope does not read.
    unread = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim"} if rope.get("rope_type") == "dynamic" else set()
    return {
        kind: {
            k: v
            for k, v in part.items()
            if v is not None and k not in unread and (k not in silent or silent[k] not in (None, v))
        }
        for kind, part in by_kind.items()
        if isinstance(part, dict)
    }


def check(config, tmp_path):
    text = models.text_config(config)
    text.pop("quantization_config", None)
    both = written(text, tmp_path)
    assert ropes(both) == ropes(text)
    if text["model_type"] not in OF_5_ONLY:
        assert both["rope_theta"] and "rope_scaling" in both
        if text["model_type"] == "phi3" and both["rope_scaling"]:
            assert sorted(both["rope_scaling"]) == ["long_factor", "short_factor", "type"]  # as transformers 4 wants it
        assert ropes({name: value for name, value in both.items() if name != "rope_parameters"}) == ropes(text)
    newer = {k: v for k, v in both.items() if k not in ROPE_DIALECTS or k.startswith(("rope_param", "original"))}
    assert ropes(newer) == ropes(text)


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_published_models(file, tmp_path):
    config = json.loads(file.read_text(encoding="utf-8"))
    if config["model_type"] == "nemotron_h":  # it encodes no positions, and its files may say nothing of ropes
        assert all(block.attention is None or block.attention.rope is None for block in layers_of(config))
        return
    check(config, tmp_path)


def layers_of(config):
    return models.config_from_hf(config).shape().layers


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
def test_what_transformers_5_saves(model_type, tmp_path):
    rope = LLAMA3 | {"rope_theta": 5e5}
    if model_type == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": 2e4}
        rope = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}, "sliding_attention": local}
    config = SIZES | {"model_type": model_type, "rope_parameters": rope}
    check(config, tmp_path)
    both = written(config, tmp_path)
    assert both["rope_theta"] == 5e5
    if model_type == "gemma3_text":
        assert both["rope_local_base_freq"] == 2e4 and both["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    else:
        assert both["rope_scaling"] == LLAMA3


def test_a_config_without_rope_gets_none(tmp_path):
    assert not set(written(SIZES | {"model_type": "llama"}, tmp_path)) & set(ROPE_DIALECTS)
