"""Hugging Face weights in and out: bit for bit, on one device and on eight, and every misfit named."""

import json
import os
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from jaxft import models
from jaxft.adapters.attach import adapters, merge
from jaxft.checkpoint import hf, safetensors_writer
from jaxft.checkpoint.hf import (
    copy_into,
    hf_tensors,
    load_weights,
    param_tensors,
    read_blocks,
    read_json,
    write_config,
    write_weights,
)
from jaxft.checkpoint.load import load_model, shardings_by_path
from jaxft.checkpoint.tensors import SafetensorsFolder
from jaxft.config import AdapterConfig, MeshConfig
from jaxft.errors import CheckpointError
from jaxft.runs.build import attach_adapter
from jaxft.sharding.arrays import host_parts
from jaxft.sharding.mesh import make_mesh_plan
from jaxft.trees import flatten

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 12))


def tensors_in(folder):
    source = SafetensorsFolder(folder)
    return {name: source.read(name) for name in source.specs()}


def save(folder, tensors, config):
    os.makedirs(folder, exist_ok=True)
    save_file(tensors, os.path.join(folder, "model.safetensors"))
    write_config(folder, config, dtype="float32")
    return str(folder)


@pytest.mark.parametrize("variant", ["plain", "tied", "biases"])
@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 20_000])
def test_export_of_an_import_is_the_same_bits(tiny_llama, tmp_path, variant, max_shard_bytes):
    folder = tiny_llama(variant)
    files = write_weights(load_model(folder).module, str(tmp_path), max_shard_bytes=max_shard_bytes)
    assert (len(files) == 1) == (max_shard_bytes > 20_000)
    assert sorted(files) == sorted(os.listdir(tmp_path))
    before, after = tensors_in(folder), tensors_in(tmp_path)
    assert set(before) == set(after)
    for name, array in before.items():
        assert array.dtype == after[name].dtype
        np.testing.assert_array_equal(array, after[name], err_msg=name)


def test_bfloat16_round_trips_too(tiny_llama, tmp_path):
    folder = tiny_llama("plain")
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors_in(folder).items()}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write_weights(load_model(folder).module, str(tmp_path / "a"), dtype="bfloat16")
    write_config(str(tmp_path / "a"), read_json(os.path.join(folder, "config.json")), dtype="bfloat16")
    loaded = load_model(str(tmp_path / "a"), dtype="float32", param_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(loaded.module))} == {np.dtype(ml_dtypes.bfloat16)}
    write_weights(loaded.module, str(tmp_path / "b"))
    for copy in ("a", "b"):
        for name, array in tensors_in(tmp_path / copy).items():
            assert array.dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(array, half[name], err_msg=name)
    assert read_json(str(tmp_path / "a" / "config.json"))["torch_dtype"] == "bfloat16"


def test_what_we_write_transformers_reads_to_the_same_logits(tiny_llama, torch_llama, tmp_path):
    torch = pytest.importorskip("torch")
    folder = tiny_llama("llama3_rope")
    loaded = load_model(folder)
    write_weights(loaded.module, str(tmp_path), max_shard_bytes=20_000)
    # Through our own Config, so that nothing of what transformers wrote is left.
    generation = {"eos_token_id": [2, 5], "pad_token_id": 0}
    write_config(str(tmp_path), loaded.module.config.to_hf(), dtype="float32", generation=generation)
    reference = torch_llama(str(tmp_path))
    assert reference.generation_config.eos_token_id == [2, 5]
    with torch.no_grad():
        expected = reference(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(loaded.logits(TOKENS), expected, rtol=0, atol=1e-5)


def test_adapters_are_merged_on_the_way_out(tiny_llama):
    module = load_model(tiny_llama("plain")).module
    attach_adapter(module, AdapterConfig(r=4, target_modules="q_proj,down_proj,lm_head"), 0)
    for adapter in adapters(module).values():
        adapter.lora_b.set_value(adapter.lora_b.get_value() + 0.1)
    lazily = {name: make() for name, (_, make) in hf_tensors(module).items()}
    merge(module)
    merged = {name: make() for name, (_, make) in hf_tensors(module).items()}
    assert set(lazily) == set(merged)
    for name, array in merged.items():
        np.testing.assert_allclose(lazily[name], array, rtol=0, atol=1e-7, err_msg=name)


def test_misfits_are_listed_all_at_once(tiny_llama, tmp_path):
    folder = tiny_llama("plain")
    tensors = tensors_in(folder)
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((32, 16), np.float32)
    tensors["model.layers.3.input_layernorm.weight"] = np.zeros(32, np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)  # harmless: derived
    broken = save(tmp_path, tensors, read_json(os.path.join(folder, "config.json")))
    with pytest.raises(CheckpointError) as caught:
        load_model(broken)
    text = str(caught.value)
    assert "(4 tensors)" in text
    for line in (
        "missing model.layers.1.mlp.up_proj.weight [48, 32]",
        "missing model.norm.weight [32]",
        "misshapen model.layers.0.self_attn.q_proj.weight: file [32, 16], config [32, 32]",
        "unexpected model.layers.3.input_layernorm.weight [32]",
    ):
        assert line in text
    assert "inv_freq" not in text


def test_a_bias_that_the_config_does_not_announce_is_refused(tiny_llama, tmp_path):
    folder = tiny_llama("biases")
    config = read_json(os.path.join(folder, "config.json")) | {"attention_bias": False}
    broken = save(tmp_path, tensors_in(folder), config)
    with pytest.raises(CheckpointError, match=r"unexpected model.layers.0.self_attn.k_proj.bias \[16\]"):
        load_model(broken)


def test_a_tied_head_stored_again_is_the_embedding_or_a_head_of_its_own(tiny_llama, tmp_path):
    folder = tiny_llama("tied")
    tensors, config = tensors_in(folder), read_json(os.path.join(folder, "config.json"))
    assert "lm_head.weight" not in tensors
    copy = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    same = load_model(save(tmp_path / "same", copy, config))
    np.testing.assert_array_equal(same.logits(TOKENS), load_model(folder).logits(TOKENS))
    copy["lm_head.weight"][-1, -1] += 1e-3
    other = load_model(save(tmp_path / "other", copy, config))
    assert other.module.lm_head is not None and "differs from the embedding" in other.notes[0]


def test_an_untied_model_without_a_head_is_refused(tiny_llama, tmp_path):
    folder = tiny_llama("tied")
    config = read_json(os.path.join(folder, "config.json")) | {"tie_word_embeddings": False}
    with pytest.raises(CheckpointError, match=r"missing lm_head.weight \[96, 32\]"):
        load_model(save(tmp_path, tensors_in(folder), config))


class Drawn:
    """A source of random tensors, the same at every call."""

    def __init__(self, specs):
        self._specs = specs

    def specs(self):
        return self._specs

    def read(self, name, index=None):
        spec = self._specs[name]
        return np.random.default_rng(len(name)).normal(size=spec.shape).astype(spec.dtype)[index or ()]


class Watched:
    """A source that remembers how many numbers were read of each tensor."""

    def __init__(self, folder):
        self.source, self.sizes = SafetensorsFolder(folder), {}

    def specs(self):
        return self.source.specs()

    def read(self, name, index=None):
        array = self.source.read(name, index)
        self.sizes.setdefault(name, []).append(array.size)
        return array


@pytest.mark.parametrize("axes", [{"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 4}])
def test_loading_onto_eight_devices_reads_once_and_equals_one_device(tiny_llama, axes):
    folder = tiny_llama("plain")
    one = flatten(nnx.state(load_model(folder).module))[0]
    source, plan = Watched(folder), make_mesh_plan(MeshConfig(**axes))
    abstract = models.abstract_model(models.config_from_hf(read_json(os.path.join(folder, "config.json"))))
    module = load_weights(abstract, source, shardings_by_path(abstract, plan))
    for path, leaf in flatten(nnx.state(module))[0].items():
        np.testing.assert_array_equal(leaf, one[path], err_msg=path)
        assert len(leaf.sharding.device_set) == 8
        assert leaf.addressable_shards[0].data.size == leaf.size // axes["fsdp"], path
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(one[path])[shard.index])
    for name, sizes in source.sizes.items():
        assert sizes == [source.specs()[name].size], f"{name} is read more than once"


def test_a_process_reads_no_further_than_what_its_devices_hold(tiny_llama):
    folder = tiny_llama("plain")
    source = Watched(folder)
    module = load_model(folder).module
    path = "layers/0/mlp/up_proj/kernel"
    whole = np.asarray(flatten(nnx.state(module))[0][path])
    layers, inputs, outputs = whole.shape
    # Two neighbours of four devices that split the inputs, and one layer fewer than there are.
    quarter = inputs // 4
    cuts = [((1, layers), (i * quarter, (i + 1) * quarter), (0, outputs)) for i in (1, 2)]
    blocks = read_blocks(param_tensors(module)[path], source, whole.dtype, cuts)
    for cut, block in blocks.items():
        np.testing.assert_array_equal(block, whole[tuple(slice(*axis) for axis in cut)])
    assert list(source.sizes.values()) == [[2 * quarter * outputs]] * (layers - 1)


@pytest.mark.parametrize("axes", [{}, {"fsdp": 8}, {"fsdp": 2, "tensor": 4}])
def test_export_in_blocks_is_the_same_and_keeps_no_host_copy(tiny_llama, monkeypatch, tmp_path, axes):
    monkeypatch.setattr(safetensors_writer, "BLOCK_BYTES", 1000)
    folder, plan = tiny_llama("plain"), make_mesh_plan(MeshConfig(**axes)) if axes else None
    module = load_model(folder, mesh=plan).module
    write_weights(module, str(tmp_path))
    source, back = SafetensorsFolder(folder), SafetensorsFolder(tmp_path)
    for name in source.specs():
        np.testing.assert_array_equal(back.read(name), source.read(name), err_msg=name)
    for path, leaf in flatten(nnx.state(module))[0].items():
        assert leaf._npy_value is None, f"{path} holds a second copy of itself"


def test_adapters_are_merged_in_blocks_too(tiny_llama, monkeypatch, tmp_path):
    module = load_model(tiny_llama("plain")).module
    attach_adapter(module, AdapterConfig(r=4, target_modules="q_proj,lm_head"), 0)
    for adapter in adapters(module).values():
        adapter.lora_b.set_value(adapter.lora_b.get_value() + 0.1)
    whole = {name: make() for name, (_, make) in hf_tensors(module).items()}
    monkeypatch.setattr(safetensors_writer, "BLOCK_BYTES", 1000)
    write_weights(module, str(tmp_path))
    for name, array in whole.items():
        np.testing.assert_array_equal(SafetensorsFolder(tmp_path).read(name), array, err_msg=name)


FUSED = {
    "model_type": "gpt_oss", "vocab_size": 96, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 16,
    "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.mark.parametrize("axes", [{}, {"fsdp": 2, "expert": 4}])
def test_experts_in_one_tensor_leave_in_blocks_of_bounded_size(monkeypatch, tmp_path, axes):
    block, largest = 2**20, []
    abstract = models.abstract_model(models.config_from_hf(FUSED))
    experts = hf_tensors(abstract)["model.layers.0.mlp.experts.gate_up_proj"][0]
    assert experts.nbytes == 8 * block
    source = Drawn({name: spec for name, (spec, _) in hf_tensors(abstract).items()})
    shardings = shardings_by_path(abstract, make_mesh_plan(MeshConfig(**axes))) if axes else None
    module = load_weights(abstract, source, shardings)
    monkeypatch.setattr(safetensors_writer, "BLOCK_BYTES", block)

    def watched(*args):
        for place, part in host_parts(*args):
            largest.append(part.nbytes)
            yield place, part

    monkeypatch.setattr(hf, "host_parts", watched)
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    write_weights(module, str(tmp_path / "first"))  # what tracing keeps is not what writing takes
    tracemalloc.start()
    try:
        write_weights(module, str(tmp_path / "second"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert max(largest) == block // axes.get("fsdp", 1)  # what comes from one device
    # The block that is written; the header and what Python keeps for it are the rest.
    assert peak < 2 * block, f"{peak} bytes"
    back = SafetensorsFolder(tmp_path / "second")
    for name, spec in source.specs().items():
        assert back.specs()[name] == spec
        np.testing.assert_array_equal(back.read(name), source.read(name), err_msg=name)


@pytest.mark.parametrize("shape", [(300, 700), (3, 5), (1, 600), (7,)])
@pytest.mark.parametrize(("before", "after"), [("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("int8", "int8")])
def test_copies_in_squares_are_plain_copies(shape, before, after):
    values = (np.random.default_rng(0).normal(size=shape) * 50).astype(before)
    for given in (values, values.T, values[::2]):
        out = np.empty(given.shape, after)
        copy_into(out, given)
        np.testing.assert_array_equal(out, given.astype(after))


def test_every_parameter_has_its_line_in_the_table(smoke_config):
    for tied in (True, False):
        hf = smoke_config | {"tie_word_embeddings": tied, "attention_bias": True, "mlp_bias": True}
        module = models.abstract_model(models.config_from_hf(hf))
        assert set(param_tensors(module)) == set(flatten(nnx.state(module))[0])


@pytest.mark.parametrize("text", ["[1]", "{", ""])
def test_a_config_that_is_no_json_object_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_json(str(tmp_path / "config.json"))


def test_write_config_keeps_fields_and_says_the_stored_type_once(tmp_path):
    write_config(str(tmp_path), {"model_type": "llama", "dtype": "bfloat16", "eos_token_id": 2}, dtype="float32")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"model_type": "llama", "eos_token_id": 2, "torch_dtype": "float32"}
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": 2}
