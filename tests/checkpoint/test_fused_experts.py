"""Experts in two tensors, as transformers writes them when told not to take them apart, are those of one each."""

import json
import shutil

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from jaxft.checkpoint.load import load_model, open_weights
from jaxft.conversion.convert import convert
from jaxft.errors import CheckpointError

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
KINDS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16},
}
TOKENS = np.arange(20).reshape(2, 10) + 3


@pytest.fixture(scope="module", params=KINDS)
def folders(request, tmp_path_factory):
    """(single, fused): one model in both forms."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(request.param, **SIZES | KINDS[request.param])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder / "single")
    model.save_pretrained(folder / "fused", save_original_format=False)
    return folder / "single", folder / "fused"


def test_the_forms_hold_the_same_tensors(folders):
    single, fused = (open_weights(str(folder))[1] for folder in folders)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(folders[1] / "model.safetensors")
    assert single.specs() == fused.specs()
    for name, spec in single.specs().items():
        np.testing.assert_array_equal(single.read(name), fused.read(name), err_msg=name)
        if len(spec.shape) == 2:
            cut = (slice(3, 9), slice(5, 7))
            np.testing.assert_array_equal(single.read(name, cut), fused.read(name, cut), err_msg=name)
    with pytest.raises(CheckpointError, match="no tensor 'model.norms.weight'. Did you mean"):
        fused.read("model.norms.weight")


def test_the_model_is_the_same_and_is_exported_with_one_tensor_for_each(folders, tmp_path):
    single, fused = folders
    np.testing.assert_array_equal(load_model(str(fused)).logits(TOKENS), load_model(str(single)).logits(TOKENS))
    convert(str(fused), str(tmp_path / "out"), console=Console(quiet=True))
    written, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", single))
    assert written.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(written[name], expected[name], err_msg=name)


def test_transposed_matrices_are_the_same_model(folders, tmp_path):
    shutil.copytree(folders[1], tmp_path / "transposed")
    file = tmp_path / "transposed" / "model.safetensors"
    experts = {n: np.ascontiguousarray(x.swapaxes(1, 2)) for n, x in load_file(file).items() if ".mlp.experts." in n}
    assert len(experts) == 4
    save_file(load_file(file) | experts, file)
    single, transposed = (open_weights(str(folder))[1] for folder in (folders[0], tmp_path / "transposed"))
    assert single.specs() == transposed.specs()
    for name, spec in single.specs().items():
        cut = (slice(3, 9), slice(5, 7))[: len(spec.shape)]
        np.testing.assert_array_equal(single.read(name, cut), transposed.read(name, cut), err_msg=name)


GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda array: {GATE_UP: array[:, :-1]}, r"gate_up_proj \[\d, \d+, 32\] is not \[experts, 2 rows, columns\]"),
        (lambda array: {GATE_UP: array[0]}, "is not .experts, 2 rows, columns"),
        (lambda array: {GATE_UP: array[:-1]}, r"missing model.layers.0.*experts.\d.*\.weight"),
    ],
)
def test_other_forms_are_refused(folders, tmp_path, change, message):
    shutil.copytree(folders[1], tmp_path / "changed")
    tensors = load_file(tmp_path / "changed" / "model.safetensors")
    changed = {name: np.ascontiguousarray(array) for name, array in change(tensors[GATE_UP]).items()}
    save_file(tensors | changed, tmp_path / "changed" / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_model(str(tmp_path / "changed"))


def test_experts_that_are_there_in_both_forms_are_refused(folders, tmp_path):
    shutil.copytree(folders[1], tmp_path / "both")
    tensors = load_file(folders[1] / "model.safetensors") | load_file(folders[0] / "model.safetensors")
    save_file(tensors, tmp_path / "both" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"weight is in model\.layers.* and in model\.layers"):
        load_model(str(tmp_path / "both"))


def test_a_family_without_experts_has_no_such_tensors(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama("plain"), tmp_path / "llama")
    file = tmp_path / "llama" / "model.safetensors"
    save_file(load_file(file) | {GATE_UP: np.zeros((2, 4, 6), np.float32)}, file)
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["model_type"] == "llama"
    with pytest.raises(CheckpointError, match="unexpected model.layers.0.mlp.experts.gate_up_proj"):
        load_model(str(tmp_path / "llama"))
