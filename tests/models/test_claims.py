"""Sizes that a file claims are compared with what there is before work in proportion to them."""

import json
import struct
import time

import numpy as np
import pytest
from gguf import GGUFWriter

from jaxft import models
from jaxft.checkpoint import hf
from jaxft.checkpoint.folders.opening import open_weights
from jaxft.errors import CheckpointError, ModelError
from jaxft.files.gguf.header import read_header
from jaxft.terminal.text import safe_message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 100_000}, "num_hidden_layers=100000 must be a whole number from 1 to 1,000"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 must be"),
        ({"hidden_size": 2**30}, "hidden_size=1073741824 must be"),
        ({"head_dim": 2**30}, "head_dim=1073741824 must be"),
        ({"intermediate_size": 2**30}, "intermediate_size=1073741824 must be"),
        ({"num_local_experts": 10**6}, "num_local_experts=1000000 must be"),
        ({"num_hidden_layers": 900, "num_experts": 9_000}, "claims 9,000 experts in 900 layers, 8,100,000 in all"),
    ],
)
def test_claims_beyond_every_model_are_refused_at_once(smoke_config, fields, message):
    start = time.process_time()
    with pytest.raises(ModelError, match=message):
        models.config_from_hf(smoke_config | fields)
    assert time.process_time() - start < 1


def header_of(folder, header, data=b""):
    raw = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def entry(shape=(1,), start=0, end=4):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}


def test_layers_are_compared_with_those_of_the_weights(tmp_path, smoke_config):
    (tmp_path / "config.json").write_text(json.dumps(smoke_config | {"num_hidden_layers": 800}))
    header_of(tmp_path, {"model.layers.1.mlp.up_proj.weight": entry()}, b"0123")
    with pytest.raises(CheckpointError, match="claims 800 layers, and the weights have those from 1 to 1"):
        open_weights(str(tmp_path))


def test_blocks_of_a_gguf_file_are_compared_with_its_tensors(tmp_path):
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2**31 - 1)
    for add in (writer.add_embedding_length, writer.add_feed_forward_length, writer.add_head_count):
        add(4)
    writer.add_context_length(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_header(str(path)).metadata["llama.block_count"] == 2**31 - 1
    with pytest.raises(ModelError, match="block_count=2,147,483,647, but the file has only 1 tensors"):
        open_weights(str(path))


@pytest.mark.parametrize("header", [{"a" * 5_000_000: entry()}, {"a": entry([1] * 10**6)}], ids=["name", "shape"])
def test_what_is_printed_of_a_name_or_a_shape_has_an_end(tmp_path, smoke_config, header):
    from jaxft.checkpoint.load import load_model

    (tmp_path / "config.json").write_text(json.dumps(smoke_config))
    header_of(tmp_path, header, b"0123")
    with pytest.raises(CheckpointError, match="do not fit config.json") as error:
        load_model(str(tmp_path))
    assert len(str(error.value)) > 1_000_000 > 10_000 > len(safe_message(error.value))


def test_the_rank_of_an_adapter_is_compared_with_its_arrays(tmp_path, smoke_config):
    from safetensors.numpy import save_file

    from jaxft.checkpoint.load import load_model

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    hf.write_weights(models.random_model(models.config_from_hf(smoke_config), seed=0), str(base))
    hf.write_config(str(base), smoke_config, dtype="float32", generation={})
    fields = {"peft_type": "VERA", "r": 10**9, "target_modules": ["q_proj"], "save_projection": False}
    fields |= {"projection_prng_key": 0, "base_model_name_or_path": str(base), "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    keys = [f"base_model.model.model.layers.{layer}.self_attn.q_proj.vera_lambda_" for layer in range(2)]
    arrays = {f"{key}{part}": np.zeros(size, np.float32) for key in keys for part, size in (("d", 8), ("b", 64))}
    save_file(arrays, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"claims r=1,000,000,000, and .*vera_lambda_d has shape \[8\]"):
        load_model(str(adapter))
