"""Folders of Qwen2.5-VL and Qwen3-VL: the text part against transformers' whole model, in and out, with adapters."""

import json
import shutil

import jax
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from jaxft import models
from jaxft.adapters.attach import adapters, attach
from jaxft.adapters.lora import LoRASettings, lora_factory
from jaxft.assets import ASSETS
from jaxft.checkpoint import peft as peft_format
from jaxft.checkpoint.load import load_model
from jaxft.conversion.convert import convert
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.errors import ModelError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
QWEN3 = TEXT | {
    "head_dim": 16,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 500.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True,
    },
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "tie_word_embeddings": False}
# One layer of 16 units.
VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32,
}  # fmt: skip
QWEN3_VISION = VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
TINY = {
    "qwen2_5_vl": {
        "text_config": TEXT
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [2, 1, 1]}},
        "vision_config": VISION | {"fullatt_block_indexes": [0]},
    },
    "qwen3_vl": {"text_config": QWEN3, "vision_config": QWEN3_VISION, "tie_word_embeddings": True},
    "qwen3_vl_moe": {"text_config": QWEN3 | EXPERTS, "vision_config": QWEN3_VISION},
}  # fmt: skip
TEXT_CLASS = {
    "qwen2_5_vl": "Qwen2ForCausalLM", "qwen3_vl": "Qwen3ForCausalLM", "qwen3_vl_moe": "Qwen3MoeForCausalLM",
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(1, 500, (2, 20))


@pytest.fixture(scope="module", params=TINY)
def nested(request, tmp_path_factory):
    """(model_type, what transformers' save_pretrained wrote of a tiny random model, with a tokenizer)."""
    config = transformers.AutoConfig.for_model(request.param, **TINY[request.param])
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5 if parameter.ndim == 1 else 0.0, 0.2, generator=generator)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    load_tokenizer(ASSETS / "smoke").save(folder)
    return request.param, folder


def theirs(folder):
    return transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def test_text_logits_are_those_of_the_whole_model(nested):
    kind, folder = nested
    loaded, expected = load_model(str(folder)), logits(theirs(folder))
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(loaded.logits(TOKENS), expected, rtol=0, atol=1e-5)
    assert loaded.left_out.startswith(f"{kind}: text only; ") and "visual (" in loaded.left_out


def test_what_is_written_is_a_plain_model_of_text(nested, tmp_path):
    kind, folder = nested
    convert(str(folder), str(tmp_path), console=Console(quiet=True))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert type(model).__name__ == TEXT_CLASS[kind]
    assert "mrope" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    np.testing.assert_allclose(logits(model), logits(theirs(folder)), rtol=0, atol=1e-5)


def test_an_adapter_means_the_same_to_peft_on_the_whole_model(nested, tmp_path):
    peft = pytest.importorskip("peft")
    _, folder = nested
    live = load_model(str(folder))
    attach(live.module, ["all-linear"], lora_factory(LoRASettings(r=2, alpha=4.0)), jax.random.key(0))
    for i, adapter in enumerate(adapters(live.module).values()):
        adapter.lora_b.set_value(0.1 * jax.random.normal(jax.random.key(i), adapter.lora_b.get_value().shape))
    peft_format.write_adapter(live.module, str(tmp_path), base=str(folder), nested=True)
    base = theirs(folder)
    before = logits(base)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path))
    found = [name for name, _ in model.named_modules() if "lora_A.default" in name]
    assert found and all(".language_model." in name for name in found)
    assert np.abs(logits(model) - before).max() > 1e-2
    np.testing.assert_allclose(live.logits(TOKENS), logits(model), rtol=0, atol=1e-5)
    np.testing.assert_allclose(load_model(str(tmp_path)).logits(TOKENS), live.logits(TOKENS), rtol=0, atol=1e-6)


def flat(config):
    """config.json as Qwen published that of 2.5: the fields of the text model beside those about images."""
    text = {k: v for k, v in config["text_config"].items() if k not in ("model_type", "rope_parameters", "layer_types")}
    scaling = {"type": "mrope", "mrope_section": [2, 1, 1]}
    rest = {k: v for k, v in config.items() if k != "text_config"}
    return rest | text | {"model_type": "qwen2_5_vl", "rope_theta": 500.0, "rope_scaling": scaling}


def test_the_flat_form_of_published_folders_is_read(nested, tmp_path):
    kind, folder = nested
    if kind != "qwen2_5_vl":
        pytest.skip("only Qwen2.5-VL has it")
    out = shutil.copytree(folder, tmp_path / "flat")
    (out / "config.json").write_text(json.dumps(flat(json.loads((folder / "config.json").read_text()))))
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value
               for name, value in tensors.items()}  # fmt: skip
    assert "model.norm.weight" in renamed and any(name.startswith("visual.") for name in renamed)
    save_file(renamed, out / "model.safetensors", {"format": "pt"})
    np.testing.assert_array_equal(load_model(str(out)).logits(TOKENS), load_model(str(folder)).logits(TOKENS))
    np.testing.assert_allclose(logits(theirs(out)), logits(theirs(folder)), rtol=0, atol=1e-6)


def test_experts_of_either_order_are_read(nested, tmp_path):
    kind, folder = nested
    if kind != "qwen3_vl_moe":
        pytest.skip("the others have no experts")
    tensors = load_file(folder / "model.safetensors")
    fused = [name for name in tensors if ".experts." in name]
    # transformers writes outputs first; the published folders have inputs first, and transformers reads both.
    assert {tensors[name].shape for name in fused} == {(6, 48, 32), (6, 32, 24)}
    out = shutil.copytree(folder, tmp_path / "exchanged")
    changed = {name: np.ascontiguousarray(tensors[name].swapaxes(1, 2)) for name in fused}
    save_file(tensors | changed, out / "model.safetensors", {"format": "pt"})
    np.testing.assert_array_equal(load_model(str(out)).logits(TOKENS), load_model(str(folder)).logits(TOKENS))
    np.testing.assert_allclose(logits(theirs(out)), logits(theirs(folder)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "text", "published"),
    [
        # Qwen3-VL 4B and 8B have the sizes of Qwen3 4B and 8B, 30B-A3B those of Qwen3 30B-A3B.
        ("qwen3_vl", {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
                      "num_attention_heads": 32, "num_key_value_heads": 8}, 8_190_735_360),
        ("qwen3_vl_moe", {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
                          "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
                          "moe_intermediate_size": 768}, 30_532_122_624),
        ("qwen2_5_vl", {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                        "num_attention_heads": 28, "num_key_value_heads": 4}, 7_615_616_512),
    ],
)  # fmt: skip
def test_sizes_and_defaults_of_real_models(kind, text, published):
    hf = {"model_type": kind, "text_config": text, "vision_config": {"depth": 1}}
    config = models.config_from_hf(hf)
    assert models.parameter_count(models.abstract_model(config)) == published
    # What transformers fills in is the same.
    inner = transformers.AutoConfig.for_model(kind, text_config=text).text_config.to_dict()
    assert models.config_from_hf(hf | {"text_config": inner}) == config


def test_what_the_text_model_does_not_read_is_refused():
    hf = {"model_type": "qwen3_vl_moe", "text_config": TEXT | EXPERTS}
    with pytest.raises(ModelError, match=r"norm_topk_prob=False \(only True is implemented\)"):
        models.config_from_hf(hf | {"text_config": TEXT | EXPERTS | {"norm_topk_prob": False}})
    with pytest.raises(ModelError, match=r"window_scale=3 \(unknown\)"):
        models.config_from_hf(hf | {"text_config": TEXT | EXPERTS | {"window_scale": 3}})
    with pytest.raises(ModelError, match=r"window_scale=3 \(unknown\)"):
        models.config_from_hf(hf | {"window_scale": 3})
