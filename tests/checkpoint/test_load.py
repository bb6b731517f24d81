"""Every kind of path that names a model, and what is said of paths that do not."""

import json
import os
import shutil

import gguf
import jax
import numpy as np
import pytest
from flax import nnx

from jaxft.adapters.attach import adapters
from jaxft.assets import ASSETS
from jaxft.checkpoint import load
from jaxft.checkpoint.hf import read_json
from jaxft.checkpoint.load import load_model, random_model, resolve
from jaxft.checkpoint.peft import write_adapter
from jaxft.checkpoint.tensors import SafetensorsFolder
from jaxft.config import AdapterConfig, MeshConfig
from jaxft.errors import CheckpointError, ModelError
from jaxft.runs.build import attach_adapter
from jaxft.sharding.mesh import make_mesh_plan

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 12))


@pytest.fixture
def adapter(tiny_llama, tmp_path):
    """A PEFT folder and the logits of the model that wrote it."""
    loaded = load_model(tiny_llama("plain"))
    attach_adapter(loaded.module, AdapterConfig(r=4, target_modules="q_proj"), 0)
    for one in adapters(loaded.module).values():
        one.lora_b.set_value(one.lora_b.get_value() + 0.1)
    write_adapter(loaded.module, str(tmp_path / "adapter"), base=tiny_llama("plain"))
    return tmp_path / "adapter", loaded.logits(TOKENS)


def name_base(folder, base):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))


def test_a_hugging_face_folder(tiny_llama):
    folder = tiny_llama("plain")
    loaded = load_model(folder)
    assert (loaded.base, loaded.adapter) == (folder, None)
    assert loaded.hf_config == read_json(os.path.join(folder, "config.json"))
    assert loaded.generation["eos_token_id"] == 2


def test_an_adapter_folder_brings_its_base(adapter, tiny_llama):
    folder, expected = adapter
    loaded = load_model(str(folder))
    assert (loaded.base, loaded.adapter) == (tiny_llama("plain"), str(folder))
    np.testing.assert_array_equal(loaded.logits(TOKENS), expected)
    assert np.abs(load_model(tiny_llama("plain")).logits(TOKENS) - expected).max() > 0.01


def test_a_base_may_be_named_relative_to_its_adapter(adapter, tiny_llama):
    folder, expected = adapter
    shutil.copytree(tiny_llama("plain"), folder.parent / "base")
    name_base(folder, "../base")
    loaded = load_model(str(folder))
    assert os.path.samefile(loaded.base, folder.parent / "base")
    np.testing.assert_array_equal(loaded.logits(TOKENS), expected)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, "does not say which base model"),
        ("/gone/base", "base model '/gone/base', which is not there. Give the folder that holds it"),
        ("../gone", "base model '../gone', which is not there"),
        ("owner/name", "cannot get hf://owner/name"),
    ],
)
def test_a_base_that_is_not_there_is_an_error_that_says_so(adapter, base, message):
    name_base(adapter[0], base)
    with pytest.raises(CheckpointError, match=message):
        load_model(str(adapter[0]))


@pytest.mark.parametrize("kind", ["adapter", "model", "merged"])
def test_a_run_folder_is_what_it_exported(tmp_path, kind):
    (tmp_path / "jaxft_run.json").write_text("{}")
    (tmp_path / "merged").mkdir()
    (tmp_path / kind).mkdir(exist_ok=True)
    assert resolve(str(tmp_path)) == str(tmp_path / kind)


def test_a_run_folder_without_exports_says_how_to_make_one(tmp_path):
    (tmp_path / "jaxft_run.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no adapter/ or model/ yet: `jaxft export --run="):
        load_model(str(tmp_path))


def test_hub_names_go_through_the_cache(monkeypatch, tiny_llama):
    import huggingface_hub

    asked = {}

    def download(name, **kwargs):
        asked.update(kwargs, name=name)
        return tiny_llama("plain")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = load_model("hf://owner/name", revision="v2")
    assert loaded.base.startswith("hf://owner/name")
    np.testing.assert_array_equal(loaded.logits(TOKENS), load_model(tiny_llama("plain")).logits(TOKENS))
    assert (asked["name"], asked["revision"]) == ("owner/name", "v2")
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])


@pytest.mark.parametrize("name", ["hf://owner/name", "hf://owner/name/model.gguf", "hf://no such name"])
def test_a_hub_name_that_cannot_be_had_is_an_error_that_says_so(name):
    with pytest.raises(CheckpointError, match=f"cannot get {name}"):
        load_model(name)


def test_a_path_of_the_hub_with_more_parts_is_refused():
    with pytest.raises(CheckpointError, match="hf://a/b/c: after hf://owner/name only a GGUF file may be named"):
        load_model("hf://a/b/c")


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"not a model: no config.json .*there: nothing"):
        load_model(str(tmp_path / "absent"))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"there: notes\.txt"):
        load_model(str(tmp_path))


def paired(array, heads):
    """llama.cpp keeps the two halves that a rotation pairs side by side."""
    split = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return split.swapaxes(1, 2).reshape(array.shape)


def write_gguf(path, folder):
    config, source = read_json(os.path.join(folder, "config.json")), SafetensorsFolder(folder)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name in source.specs():
        array = source.read(name)
        if "q_proj" in name:
            array = paired(array, config["num_attention_heads"])
        if "k_proj" in name:
            array = paired(array, config["num_key_value_heads"])
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("variant", ["plain", "tied"])
def test_a_gguf_file_is_the_folder_it_was_made_from(tiny_llama, tmp_path, variant):
    write_gguf(str(tmp_path / "model.gguf"), tiny_llama(variant))
    loaded = load_model(str(tmp_path / "model.gguf"))
    expected = load_model(tiny_llama(variant)).logits(TOKENS)
    np.testing.assert_allclose(loaded.logits(TOKENS), expected, rtol=0, atol=1e-5)


def test_a_model_on_eight_devices_gives_the_logits_of_one(adapter):
    folder, expected = adapter
    plan = make_mesh_plan(MeshConfig(data=2, fsdp=4))
    np.testing.assert_allclose(load_model(str(folder), mesh=plan).logits(TOKENS), expected, rtol=0, atol=1e-5)


def test_a_random_model_takes_only_the_shapes():
    one, same, other = (
        random_model(str(ASSETS / "smoke"), seed=seed, dtype="float32", param_dtype="bfloat16") for seed in (0, 0, 1)
    )
    assert one.module.config.hidden_size == 64
    leaves = [jax.tree.leaves(nnx.state(loaded.module))[0] for loaded in (one, same, other)]
    assert leaves[0].dtype == jax.numpy.bfloat16
    assert np.array_equal(leaves[0], leaves[1])
    assert not np.array_equal(leaves[0], leaves[2])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[0, 96]], "run from 0 to 96; the vocabulary has 96"),
        ([[-1, 3]], "run from -1 to 3"),
        ([0, 1], r"integers \[B, S\], got int64 of shape \(2,\)"),
        ([[0.5]], "got float64"),
    ],
)
def test_logits_refuse_what_is_no_batch_of_token_ids(tiny_llama, tokens, message):
    with pytest.raises(ModelError, match=message):
        load_model(tiny_llama("plain")).logits(tokens)


def test_shardings_are_by_path(tiny_llama):
    module = load_model(tiny_llama("plain")).module
    by_path = load.shardings_by_path(module, make_mesh_plan(MeshConfig(fsdp=8)))
    assert by_path["layers/0/mlp/up_proj/kernel"].spec == jax.sharding.PartitionSpec(None, "fsdp")


def test_code_in_a_folder_of_a_known_family_is_never_run_and_not_exported(tmp_path):
    """Phi-3 and Phi-4 come with code that transformers has taken the place of."""
    from jaxft.assets import ASSETS
    from jaxft.data.tokenizers.load import load_tokenizer
    from jaxft.runs.export import export

    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Phi3Config(vocab_size=512, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    folder = tmp_path / "phi"
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    load_tokenizer(ASSETS / "smoke").save(folder)
    code = {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        "AutoTokenizer": "Xenova/gpt-4o",
    }
    for module in ("configuration_phi3", "modeling_phi3"):
        (folder / f"{module}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    hf = json.loads((folder / "config.json").read_text()) | {"auto_map": code}
    (folder / "config.json").write_text(json.dumps(hf))
    load_tokenizer(folder)
    checks = export(str(folder), str(tmp_path / "out"))["checks"]
    assert set(checks) == {"jaxft", "transformers"}
    assert not (tmp_path / "ran").exists()
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not list((tmp_path / "out").glob("*.py"))
    (folder / "config.json").write_text(json.dumps(hf | {"model_type": "phi9"}))
    with pytest.raises(ModelError, match="'phi9' is not implemented.*never run"):
        load_model(str(folder))
