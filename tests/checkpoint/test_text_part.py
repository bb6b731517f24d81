"""Folders of models that take images too: the text part against transformers, in and out, with adapters."""

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
from jaxft.checkpoint.gguf.write import write_gguf_adapter
from jaxft.checkpoint.load import hf_config_of, load_model, open_weights, random_model
from jaxft.checkpoint.peft import folder as peft_folder
from jaxft.checkpoint.verify import check_export
from jaxft.conversion.convert import convert
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.errors import CheckpointError, ModelError
from jaxft.runs.export import export

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
PIXTRAL = VISION | {"model_type": "pixtral", "head_dim": 8}
QWEN_VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32,
    "num_position_embeddings": 16,
}  # fmt: skip
GEMMA4 = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 24}
TINY = {
    "gemma4": {
        "text_config": TEXT | GEMMA4 | {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True},
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 20,
        },
    },
    "gemma4_unified": {
        "text_config": TEXT | GEMMA4,
        "vision_config": {"mm_embed_dim": 16, "mm_posemb_size": 20, "output_proj_dims": 32},
    },
    "gemma3": {"text_config": TEXT | {"sliding_window": 7, "sliding_window_pattern": 2}, "vision_config": VISION},
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral", "sliding_window": None},
        "vision_config": PIXTRAL,
        "tie_word_embeddings": False,
    },
    "mistral3-tied": {"text_config": TEXT | {"model_type": "ministral3"}, "vision_config": PIXTRAL},
    "llama4": {
        "text_config": TEXT
        | {"intermediate_size_mlp": 40, "num_local_experts": 4, "attention_chunk_size": 8, "no_rope_layers": [1, 0]},
        "vision_config": VISION | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    },
    "qwen3_5": {
        "text_config": TEXT
        | {
            "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
        },
        "vision_config": QWEN_VISION,
    },
}  # fmt: skip
TEXT_CLASS = {
    "gemma3": "Gemma3ForCausalLM", "mistral3": "MistralForCausalLM", "mistral3-tied": "Ministral3ForCausalLM",
    "qwen3_5": "Qwen3_5ForCausalLM", "gemma4": "Gemma4ForCausalLM", "gemma4_unified": "Gemma4UnifiedForCausalLM",
    "llama4": "Llama4ForCausalLM",
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(1, 500, (2, 20))
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """folder_of(name) -> what transformers' save_pretrained wrote of a tiny random model, and a tokenizer."""
    made = {}

    def make(name):
        if name not in made:
            kind = name.removesuffix("-tied")
            config = transformers.AutoConfig.for_model(kind, **TINY[name])
            model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in model.parameters():
                    # Narrower where float32 would differ by more than the tolerance.
                    stddev = 0.06 if kind == "qwen3_5" else 0.2
                    parameter.normal_(0.5 if parameter.ndim == 1 else 0.0, stddev, generator=generator)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            load_tokenizer(ASSETS / "smoke").save(folder)
            made[name] = folder
        return made[name]

    return make


@pytest.fixture(params=TINY)
def nested(request, folder_of):
    return request.param, folder_of(request.param)


def theirs(folder):
    return transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def logits(model):
    whole = model.base_model.model if hasattr(model, "peft_config") else model
    if whole.config.model_type == "llama4":  # whose class fails on text alone in transformers 5.24
        model = whole.language_model
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def changed(folder, to, *, config=None, tensors=None):
    """A copy with another config.json, or other tensors; each change is a function of what is there."""
    shutil.copytree(folder, to)
    if config is not None:
        (to / "config.json").write_text(json.dumps(config(json.loads((to / "config.json").read_text()))))
    if tensors is not None:
        save_file(tensors(load_file(to / "model.safetensors")), to / "model.safetensors", {"format": "pt"})
    return to


def trained(folder, size=0.1):
    loaded = load_model(str(folder))
    settings = LoRASettings(r=2, alpha=4.0)
    targets = ["all-linear"] if loaded.module.config.tie_word_embeddings else ["all-linear", "lm_head"]
    attach(loaded.module, targets, lora_factory(settings), jax.random.key(0))
    for i, adapter in enumerate(adapters(loaded.module).values()):
        adapter.lora_b.set_value(size * jax.random.normal(jax.random.key(i), adapter.lora_b.get_value().shape))
    return loaded


def test_text_logits_are_those_of_the_whole_model(nested):
    _, folder = nested
    loaded, expected = load_model(str(folder)), logits(theirs(folder))
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(loaded.logits(TOKENS), expected, rtol=0, atol=1e-5)


def new_names(tensors):
    out = {}
    for name, array in tensors.items():
        if name.startswith(("model.", "lm_head.")):  # new already
            out[name] = array
            continue
        inner = name.replace("language_model.model.", "language_model.", 1)
        head = name.startswith("language_model.lm_head")
        out[name.removeprefix("language_model.") if head else f"model.{inner}"] = array
    return out


def test_both_generations_of_names_are_read(nested, tmp_path):
    _, folder = nested
    renamed = changed(folder, tmp_path / "renamed", tensors=new_names)
    names = set(load_file(renamed / "model.safetensors"))
    assert "model.language_model.norm.weight" in names and "language_model.model.norm.weight" not in names
    (config, expected, _), (same, source, _) = open_weights(str(folder)), open_weights(str(renamed))
    assert same == config and source.specs() == expected.specs()
    for name in expected.specs():
        np.testing.assert_array_equal(source.read(name), expected.read(name), err_msg=name)


def test_what_is_left_out_is_said(folder_of):
    said = load_model(str(folder_of("mistral3"))).left_out
    stored = load_file(folder_of("mistral3") / "model.safetensors")
    images = [name for name in stored if "language_model" not in name]
    numbers = sum(stored[name].size for name in images)
    assert said.startswith(f"mistral3: text only; {len(images)} tensors of {numbers:,} numbers are left out: ")
    assert "multi_modal_projector (4), vision_tower (" in said


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("gemma3", "convert"), ("mistral3", "export"), ("mistral3-tied", "convert"), ("qwen3_5", "export"),
        ("gemma4", "convert"), ("gemma4_unified", "export"),
    ],
)  # fmt: skip
def test_what_is_written_is_of_text_only_and_says_so(folder_of, tmp_path, capsys, name, how):
    folder, out = str(folder_of(name)), tmp_path / "out"
    done = convert(folder, str(out), console=Console()) if how == "convert" else export(folder, str(out))
    assert done["left_out"] == load_model(folder).left_out
    if how == "convert":
        assert done["left_out"] in capsys.readouterr().out.replace("\n", "")
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [TEXT_CLASS[name]] and "vision_config" not in config
    model = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert type(model).__name__ == TEXT_CLASS[name]
    np.testing.assert_allclose(logits(model), logits(theirs(folder)), rtol=0, atol=1e-5)
    assert open_weights(str(out))[1].specs() == open_weights(folder)[1].specs()
    assert load_model(str(out)).left_out is None


def test_layers_that_predict_several_tokens_are_left_out_and_counted(folder_of, tmp_path):
    extra = {"mtp.fc.weight": np.ones((4, 8), np.float32), "mtp.norm.weight": np.ones(8, np.float32)}
    folder = changed(folder_of("qwen3_5"), tmp_path / "with", tensors=lambda tensors: tensors | extra)
    loaded, plain = load_model(str(folder)), load_model(str(folder_of("qwen3_5")))
    assert any("2 tensors of 40 numbers predict several tokens at once (MTP)" in note for note in loaded.notes)
    assert loaded.left_out == plain.left_out and "visual (" in loaded.left_out
    np.testing.assert_array_equal(loaded.logits(TOKENS), plain.logits(TOKENS))


def test_orbax_holds_the_text_part(folder_of, tmp_path):
    folder = str(folder_of("mistral3"))
    convert(folder, str(tmp_path / "orbax"), form="orbax", console=QUIET)
    back, expected = open_weights(str(tmp_path / "orbax"))[1], open_weights(folder)[1]
    assert back.specs() == expected.specs()
    for name in expected.specs():
        np.testing.assert_array_equal(back.read(name), expected.read(name), err_msg=name)


def test_an_adapter_means_the_same_to_peft_on_the_whole_model(nested, tmp_path):
    peft = pytest.importorskip("peft")
    name, folder = nested
    live = trained(folder, size=0.03 if name == "qwen3_5" else 0.1)
    peft_format.write_adapter(live.module, str(tmp_path), base=str(folder), nested=True)
    base = theirs(folder)
    before = logits(base)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path))
    assert not [n for n, _ in model.named_modules() if "lora_A.default" in n and "vision" in n]
    found = {n for n, _ in model.named_parameters() if "lora_" in n}
    assert len(found) == len(peft_folder.AdapterTensors(str(tmp_path)).specs())
    assert np.abs(logits(model) - before).max() > 1e-2
    np.testing.assert_allclose(live.logits(TOKENS), logits(model), rtol=0, atol=1e-5)
    assert [check.reader for check in check_export(live, str(tmp_path), dtype="float32")] == ["jaxft", "peft"]


def test_adapters_are_read_with_the_keys_of_either_generation_and_of_text_only(folder_of, tmp_path):
    folder = folder_of("mistral3")
    live = trained(folder)
    peft_format.write_adapter(live.module, str(tmp_path / "now"), base=str(folder), nested=True)
    peft_format.write_adapter(live.module, str(tmp_path / "text"), base=str(folder))

    def older(tensors):
        keys = {key: key.replace("model.model.language_model.", "model.language_model.model.") for key in tensors}
        return {keys[key].replace("model.lm_head", "model.language_model.lm_head"): tensors[key] for key in tensors}

    shutil.copytree(tmp_path / "now", tmp_path / "before")
    file = tmp_path / "before" / peft_folder.WEIGHTS
    save_file(older(load_file(file)), file)
    assert not set(load_file(file)) & set(load_file(tmp_path / "now" / peft_folder.WEIGHTS))
    expected = live.logits(TOKENS)
    for kind in ("now", "before", "text"):
        np.testing.assert_array_equal(load_model(str(tmp_path / kind)).logits(TOKENS), expected)


def test_an_adapter_that_peft_saved_of_the_whole_model_is_read_and_merged(folder_of, tmp_path):
    peft = pytest.importorskip("peft")
    folder = folder_of("mistral3")
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.(q|down)_proj", init_lora_weights=False)
    model = peft.get_peft_model(theirs(folder), config)
    model.save_pretrained(tmp_path / "lora")
    settings = json.loads((tmp_path / "lora" / peft_folder.CONFIG).read_text()) | {
        "base_model_name_or_path": str(folder)
    }
    (tmp_path / "lora" / peft_folder.CONFIG).write_text(json.dumps(settings))
    expected = logits(model.eval())
    np.testing.assert_allclose(load_model(str(tmp_path / "lora")).logits(TOKENS), expected, rtol=0, atol=1e-5)
    convert(str(tmp_path / "lora"), str(tmp_path / "merged"), console=QUIET)
    np.testing.assert_allclose(load_model(str(tmp_path / "merged")).logits(TOKENS), expected, rtol=0, atol=1e-5)


def test_the_adapter_of_a_nested_model_goes_into_gguf(folder_of, tmp_path):
    from gguf import GGUFReader

    folder = folder_of("mistral3")
    for name, is_nested in (("nested", True), ("text", False)):
        peft_format.write_adapter(trained(folder).module, str(tmp_path / name), base=str(folder), nested=is_nested)
        write_gguf_adapter(str(tmp_path / f"{name}.gguf"), str(tmp_path / name), hf_config_of(str(folder)))
    first, second = (GGUFReader(tmp_path / f"{name}.gguf").tensors for name in ("nested", "text"))
    assert {t.name for t in first} == {t.name for t in second}


def test_defaults_of_a_gemma_folder_that_says_little(folder_of, tmp_path):
    """Google's own 4B folder says only what differs from transformers' defaults."""
    little = {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
        "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
        "model_type": "gemma3", "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    }  # fmt: skip
    text = models.text_config(little)
    assert text["eos_token_id"] == [1, 106] and text["num_attention_heads"] == 8 and text["vocab_size"] == 262208
    assert models.parameter_count(models.abstract_model(models.config_from_hf(little))) == 3_880_263_168
    inner = transformers.Gemma3Config(**little).text_config.to_dict()
    assert models.config_from_hf(text) == models.config_from_hf(inner)
    (tmp_path / "config.json").write_text(json.dumps(little | {"text_config": TEXT | {"sliding_window": 7}}))
    drawn = random_model(str(tmp_path), seed=0, dtype="float32", param_dtype="float32")
    assert drawn.hf_config["model_type"] == "gemma3_text" and drawn.left_out is None


def test_a_null_of_text_config_is_not_a_default(folder_of):
    """Mistral Small 3.1 has no window, and says so; a config that says nothing has one."""
    assert load_model(str(folder_of("mistral3"))).module.config.sliding_window is None
    inner = TEXT | {"model_type": "mistral"}
    assert models.config_from_hf({"model_type": "mistral3", "text_config": inner}).sliding_window == 4096


def test_the_head_is_what_the_files_hold(folder_of, tmp_path):
    """transformers ties by its default unless the files hold another head, and Mistral's own folder says nothing."""

    def silent(config):
        return {k: v for k, v in config.items() if k != "tie_word_embeddings"}

    untied = changed(folder_of("mistral3"), tmp_path / "untied", config=silent)
    tied = changed(folder_of("mistral3-tied"), tmp_path / "tied", config=silent)

    def with_copy(tensors):
        return tensors | {"language_model.lm_head.weight": tensors["language_model.model.embed_tokens.weight"].copy()}

    copied = changed(tied, tmp_path / "copied", tensors=with_copy)
    wrongly = changed(untied, tmp_path / "wrongly", config=lambda c: c | {"tie_word_embeddings": True})
    for folder, expected in ((untied, False), (tied, True), (copied, True), (wrongly, False)):
        loaded = load_model(str(folder))
        assert loaded.module.config.tie_word_embeddings is expected
        np.testing.assert_allclose(loaded.logits(TOKENS), logits(theirs(folder)), rtol=0, atol=1e-5)
    says_untied = changed(tied, tmp_path / "says_untied", config=lambda c: c | {"tie_word_embeddings": False})
    with pytest.raises(CheckpointError, match="missing lm_head.weight"):
        load_model(str(says_untied))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t | {"audio_tower.x": np.zeros(3, np.float32)},
            r"1 tensors belong neither to .*'gemma3'.*\n  audio_tower.x",
        ),
        (lambda t: t | {"model.norm.weight": np.zeros(32, np.float32)}, r"neither[\s\S]*model.norm.weight \[32\]"),
        (
            lambda t: t | {"model.language_model.norm.weight": np.zeros(32, np.float32)},
            "'model.norm.weight' is there as 'language_model.model.norm.weight' and as 'model.language_model.norm",
        ),
        (
            lambda t: t | {"language_model.model.twist": np.zeros(3, np.float32)},
            r"do not fit config.json[\s\S]*unexpected model.twist",
        ),
        (
            lambda t: {k: v for k, v in t.items() if k != "language_model.model.norm.weight"},
            r"missing model.norm.weight \[32\]",
        ),
    ],
)
def test_tensors_of_neither_part_and_misfits_are_refused(folder_of, tmp_path, change, message):
    folder = changed(folder_of("gemma3"), tmp_path / "changed", tensors=change)
    with pytest.raises(CheckpointError, match=message):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_scale": 3}, r"'gemma3' has fields .*window_scale=3 \(unknown\)"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"text_config": None}, "'gemma3' lacks text_config"),
        ({"text_config": "gemma3_text"}, "text_config='gemma3_text' must be an object"),
        ({"text_config": TEXT | {"window_scale": 3}}, r"'gemma3_text' has fields .*window_scale=3 \(unknown\)"),
        ({"text_config": TEXT | {"model_type": "gemma9"}}, "model_type 'gemma9' is not implemented"),
    ],
)
def test_fields_of_either_part_that_are_not_understood_are_refused(folder_of, tmp_path, change, message):
    folder = changed(folder_of("gemma3"), tmp_path / "changed", config=lambda config: config | change)
    with pytest.raises(ModelError, match=message):
        load_model(str(folder))


def test_an_adapter_that_names_one_layer_twice_or_an_image_layer_is_refused(folder_of, tmp_path):
    peft_format.write_adapter(trained(folder_of("gemma3")).module, str(tmp_path), base=str(folder_of("gemma3")))
    file = tmp_path / peft_folder.WEIGHTS
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    inside = key.replace("model.layers", "model.language_model.layers")
    save_file(tensors | {inside: tensors[key]}, file)
    with pytest.raises(CheckpointError, match="are the same tensor of the base"):
        load_model(str(tmp_path))
    image = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(tensors | {image: tensors[key]}, file)
    with pytest.raises(CheckpointError, match=r"name no layer of the model, among them \['.*vision_tower"):
        load_model(str(tmp_path))


def test_nothing_of_the_image_parts_is_read(folder_of, monkeypatch):
    source = open_weights(str(folder_of("gemma3")))[1].source
    read = []
    monkeypatch.setattr(type(source._source), "read", lambda self, name, index=None: read.append(name))
    for name in source.specs():
        source.read(name)
    assert read and all(name.startswith("language_model.") for name in read)
    with pytest.raises(CheckpointError, match="no tensor 'model.norms.weight' in the language model. Did you mean"):
        source.read("model.norms.weight")


def test_an_empty_image_part_is_said_too(folder_of, tmp_path):
    def text_only(tensors):
        return {name: array for name, array in tensors.items() if name.startswith("language_model.")}

    folder = changed(folder_of("gemma3"), tmp_path / "text", tensors=text_only)
    assert load_model(str(folder)).left_out == "gemma3: text only; the folder has no tensors for images"


def test_a_reward_model_is_not_made_of_a_part(folder_of):
    with pytest.raises(ModelError, match="made of a text-only model, and this one takes images too"):
        load_model(str(folder_of("gemma3")), head="score")
