"""NaN and infinite weights are found wherever they are, and nothing else is."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft.checkpoint.finite import CHUNK, FiniteSource, all_finite, check_finite
from jaxft.checkpoint.load import load_model
from jaxft.checkpoint.merged import MergedSource
from jaxft.checkpoint.peft import write_adapter
from jaxft.checkpoint.peft.folder import PREFIX, WEIGHTS
from jaxft.checkpoint.tensors import SafetensorsFolder
from jaxft.config import AdapterConfig
from jaxft.errors import CheckpointError
from jaxft.runs.build import attach_adapter

FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("size", [1, 7, CHUNK, CHUNK + 3])
def test_every_kind_of_value_in_every_place(dtype, size):
    largest = ml_dtypes.finfo(dtype).max
    values = np.resize(np.array([0, -0.0, 1, -1, largest, -largest, ml_dtypes.finfo(dtype).tiny], dtype), size)
    assert all_finite(values)
    for place in {0, size // 2, size - 1}:
        for wrong in (np.nan, -np.nan, np.inf, -np.inf):
            damaged = values.copy()
            damaged[place] = wrong
            assert all_finite(damaged) == bool(np.isfinite(damaged.astype(np.float64)).all())
            assert not all_finite(damaged)


def test_any_order_of_axes_and_whole_numbers():
    values = np.ones((6, 5, 4), np.float32)
    values[3, 2, 1] = np.nan
    for view in (values, values.T, values[:, ::2], values[3:4], values[:, 2].T):
        assert all_finite(view) == bool(np.isfinite(view).all())
    assert all_finite(np.zeros((0, 3), np.float32)) and all_finite(np.array([2**31 - 1], np.int32))


def test_the_refusal_names_the_tensor_and_counts():
    values = np.array([[np.nan, 1, np.inf], [-np.inf, np.nan, 2]], ml_dtypes.bfloat16)
    with pytest.raises(CheckpointError, match="tensor 'x' has 2 NaN and 2 infinite values among the 6 that were read"):
        check_finite("x", values)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_model_with_a_value_that_is_no_number_is_not_loaded(tiny_llama, tmp_path, wrong):
    folder = tiny_llama("plain")
    tensors = load_file(f"{folder}/model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][40, 3] = wrong
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(open(f"{folder}/config.json", "rb").read())
    with pytest.raises(CheckpointError, match=r"'model\.layers\.2\.mlp\.up_proj\.weight' has [01] NaN and [01] inf"):
        load_model(str(tmp_path))


def test_an_adapter_with_a_value_that_is_no_number_is_not_read(tiny_llama, tmp_path):
    base = tiny_llama("plain")
    loaded = load_model(base)
    attach_adapter(loaded.module, AdapterConfig(r=2), 0)
    write_adapter(loaded.module, str(tmp_path), base=base)
    tensors = load_file(tmp_path / WEIGHTS)
    key = f"{PREFIX}model.layers.1.self_attn.q_proj.lora_B.weight"
    tensors[key][0, 0] = np.nan
    save_file(tensors, tmp_path / WEIGHTS)
    for read in (lambda: load_model(str(tmp_path)), lambda: MergedSource(SafetensorsFolder(base), str(tmp_path))):
        with pytest.raises(CheckpointError, match="layers.1.self_attn.q_proj.lora_B.weight' has 1 NaN and 0 infinite"):
            read()


@pytest.mark.parametrize("dtype", [np.int32, np.bool_, np.uint8])
def test_whole_numbers_are_no_weights(tiny_llama, tmp_path, dtype):
    folder = tiny_llama("plain")
    tensors = load_file(f"{folder}/model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(open(f"{folder}/config.json", "rb").read())
    with pytest.raises(CheckpointError, match=f"no weights in model.norm.weight: the file has {np.dtype(dtype)}"):
        load_model(str(tmp_path))
    with pytest.raises(CheckpointError, match=f"'model.norm.weight' is stored as {np.dtype(dtype)}"):
        FiniteSource(SafetensorsFolder(tmp_path)).read("model.norm.weight")
