"""An export that is not what was trained does not leave the house."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft.adapters.attach import adapters
from jaxft.checkpoint.hf import write_config, write_weights
from jaxft.checkpoint.load import load_model
from jaxft.checkpoint.peft import write_adapter
from jaxft.checkpoint.verify import TOLERANCE, check_export, probe
from jaxft.config import AdapterConfig
from jaxft.errors import CheckpointError, ExportError
from jaxft.runs.build import attach_adapter


def live_model(folder, size=0.1):
    """A model with adapters as if trained; size: spread of their B."""
    loaded = load_model(folder)
    attach_adapter(loaded.module, AdapterConfig(r=4), 0)
    for index, adapter in enumerate(adapters(loaded.module).values()):
        drawn = jax.random.normal(jax.random.key(index), adapter.lora_b.get_value().shape)
        adapter.lora_b.set_value(size * drawn)
    return loaded


@pytest.fixture(scope="module")
def live(tiny_llama):
    return live_model(tiny_llama("plain"))


@pytest.fixture(scope="module")
def exports(live, tmp_path_factory):
    """Whole exports of the live model: adapter, float32, bfloat16."""
    folder = tmp_path_factory.mktemp("exports")
    write_adapter(live.module, str(folder / "adapter"), base=live.base)
    for dtype in ("float32", "bfloat16"):
        (folder / dtype).mkdir()
        write_weights(live.module, str(folder / dtype), dtype=dtype)
        write_config(str(folder / dtype), live.hf_config, dtype=dtype)
    return folder


def damaged(exports, tmp_path, name, change):
    """A copy of an export whose tensors are changed."""
    shutil.copytree(exports / name, tmp_path / name)
    file = tmp_path / name / ("adapter_model.safetensors" if name == "adapter" else "model.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return str(tmp_path / name)


@pytest.mark.parametrize(("name", "reader"), [("adapter", "peft"), ("float32", "transformers")])
def test_a_whole_export_passes_every_reader(live, exports, name, reader):
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    checks = check_export(live, str(exports / name), dtype="float32")
    assert [check.reader for check in checks] == ["jaxft", reader]
    assert all(check.difference <= 1e-5 for check in checks)


def test_bfloat16_passes_within_its_rounding_only(live, exports, no_peers):
    (check,) = check_export(live, str(exports / "bfloat16"), dtype="bfloat16")
    assert TOLERANCE["float32"] < check.difference <= TOLERANCE["bfloat16"]
    with pytest.raises(ExportError, match="allowed 1e-04 for float32 weights"):
        check_export(live, str(exports / "bfloat16"), dtype="float32")


@pytest.fixture
def no_peers(monkeypatch):
    """Our own reader alone, which must notice by itself."""
    from jaxft.checkpoint import verify

    monkeypatch.setattr(verify, "PEER_LIMIT", 0)


def negate(name):
    def change(tensors):
        tensors[name] = -tensors[name]

    return change


def zero_b(tensors):
    for name in tensors:
        if "lora_B" in name:
            tensors[name] = np.zeros_like(tensors[name])


def one_nan(tensors):
    name = min(name for name in tensors if "weight" in name)
    tensors[name].flat[0] = np.nan


LORA_B = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param("float32", negate("model.layers.2.mlp.down_proj.weight"), id="merged-flipped"),
        pytest.param("adapter", negate(LORA_B), id="adapter-flipped"),
        pytest.param("adapter", zero_b, id="adapter-that-does-nothing"),
    ],
)
def test_damaged_weights_are_an_export_error(live, exports, tmp_path, no_peers, name, change):
    with pytest.raises(ExportError, match="read by jaxft differs from the live model"):
        check_export(live, damaged(exports, tmp_path, name, change), dtype="float32")


def test_a_merged_export_without_the_adapter_is_an_export_error(live, tiny_llama, no_peers):
    with pytest.raises(ExportError, match="differs from the live model"):
        check_export(live, tiny_llama("plain"), dtype="float32")


def test_bfloat16_rounding_does_not_hide_a_lost_layer(live, exports, tmp_path, no_peers):
    def lose(tensors):
        name = "model.layers.1.self_attn.o_proj.weight"
        tensors[name] = np.zeros_like(tensors[name])
        assert tensors[name].dtype == ml_dtypes.bfloat16

    with pytest.raises(ExportError):
        check_export(live, damaged(exports, tmp_path, "bfloat16", lose), dtype="bfloat16")


def test_an_adapter_of_little_effect_that_is_lost_is_noticed(tiny_llama, tmp_path, no_peers):
    # What one small step leaves: within the tolerance of the logits, but not nothing.
    live = live_model(tiny_llama("plain"), size=8e-7)
    write_adapter(live.module, str(tmp_path / "adapter"), base=live.base)
    assert check_export(live, str(tmp_path / "adapter"), dtype="float32")[0].difference == 0
    tokens = probe(live.module.config.vocab_size)
    effect = live.logits(tokens) - load_model(live.base).logits(tokens)
    assert 2e-5 < np.abs(effect).max() / np.abs(live.logits(tokens)).max() < TOLERANCE["float32"]
    with pytest.raises(ExportError, match="differs from the live model"):
        check_export(live, damaged(tmp_path, tmp_path / "copy", "adapter", zero_b), dtype="float32")


def test_a_fresh_adapter_passes(tiny_llama, tmp_path, no_peers):
    live = live_model(tiny_llama("plain"), size=0.0)
    write_adapter(live.module, str(tmp_path), base=live.base)
    assert check_export(live, str(tmp_path), dtype="float32")[0].difference == 0


def test_an_export_that_holds_a_nan_is_refused(exports, live, tmp_path):
    with pytest.raises(CheckpointError, match="'lm_head.weight' has 1 NaN .* or take them from an earlier step"):
        check_export(live, damaged(exports, tmp_path, "float32", one_nan), dtype="float32")


def test_an_adapter_with_a_foreign_prefix_is_refused(live, exports, tmp_path):
    def rename(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("base_model.")] = tensors.pop(name)

    with pytest.raises(CheckpointError, match="name no layer"):
        check_export(live, damaged(exports, tmp_path, "adapter", rename), dtype="float32")


def test_a_wrong_config_is_noticed_although_the_weights_fit(live, exports, tmp_path, no_peers):
    shutil.copytree(exports / "float32", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["rope_theta"] = 100.0
    path.write_text(json.dumps(config))
    with pytest.raises(ExportError):
        check_export(live, str(tmp_path / "model"), dtype="float32")


def test_the_probe_is_the_same_for_every_export_of_a_vocabulary():
    np.testing.assert_array_equal(probe(96), probe(96))
    assert probe(96).max() < 96
