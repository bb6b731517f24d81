"""PEFT folders both ways against PEFT itself, and every refusal."""

import copy
import json
import os
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft.adapters.attach import adapters
from jaxft.checkpoint.hf import hf_tensors
from jaxft.checkpoint.load import load_model
from jaxft.checkpoint.peft import read_adapter, write_adapter
from jaxft.checkpoint.peft.lora import read_settings
from jaxft.config import AdapterConfig
from jaxft.errors import CheckpointError, ModelError
from jaxft.runs.build import attach_adapter

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 12))


def torch_logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def by_peft(torch_llama, base, folder, **settings):
    """A PEFT model whose adapter, with B drawn too, is saved in `folder`."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM"} | settings
    model = peft.get_peft_model(torch_llama(base), peft.LoraConfig(**settings))
    model.save_pretrained(folder)
    return model


def ours(base, seed=0, **settings):
    """Our model with adapters as if trained."""
    loaded = load_model(base)
    attach_adapter(loaded.module, AdapterConfig(**{"r": 4, "alpha": 8.0} | settings), seed)
    for index, adapter in enumerate(adapters(loaded.module).values()):
        drawn = jax.random.normal(jax.random.key(index), adapter.lora_b.get_value().shape)
        adapter.lora_b.set_value(0.1 * drawn)
    return loaded


CASES = [
    pytest.param("plain", {"target_modules": "all-linear"}, id="all-linear"),
    pytest.param("tied", {"target_modules": ["q_proj", "v_proj"]}, id="tied-q-v"),
    pytest.param("plain", {"target_modules": ["o_proj", "down_proj"], "use_rslora": True, "r": 8}, id="rslora"),
    pytest.param("biases", {"target_modules": ["k_proj", "up_proj", "lm_head"], "lora_alpha": 3}, id="head-biases"),
]


@pytest.mark.parametrize(("variant", "settings"), CASES)
def test_what_peft_wrote_gives_pefts_logits(tiny_llama, torch_llama, tmp_path, variant, settings):
    base = tiny_llama(variant)
    reference = by_peft(torch_llama, base, tmp_path, **settings)
    # In float64, so that the tolerance is left to our own rounding: torch's alone reaches it on some processors.
    expected = torch_logits(copy.deepcopy(reference).double())
    loaded = load_model(str(tmp_path))
    assert (loaded.base, loaded.adapter) == (base, str(tmp_path))
    np.testing.assert_allclose(loaded.logits(TOKENS), expected, rtol=0, atol=1e-5)
    assert np.abs(expected - load_model(base).logits(TOKENS)).max() > 0.01
    merged = {name: make() for name, (_, make) in hf_tensors(loaded.module).items()}
    for name, tensor in reference.merge_and_unload().state_dict().items():
        if name in merged:
            np.testing.assert_allclose(merged.pop(name), tensor.numpy(), rtol=0, atol=1e-5, err_msg=name)
    assert not merged


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("tied", {}),
        ("plain", {"target_modules": "q_proj,mlp/up_proj,lm_head", "use_rslora": True, "alpha": 4.5, "dropout": 0.1}),
    ],
)
def test_what_we_wrote_gives_our_logits_in_peft(tiny_llama, torch_llama, tmp_path, variant, settings):
    base = tiny_llama(variant)
    live = ours(base, **settings)
    write_adapter(live.module, str(tmp_path), base=base)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base
    reference = torch_llama(base)
    untouched = torch_logits(reference)
    read = peft.PeftModel.from_pretrained(reference, str(tmp_path))
    expected = live.logits(TOKENS)
    np.testing.assert_allclose(torch_logits(read), expected, rtol=0, atol=1e-4)
    assert np.abs(untouched - expected).max() > 0.01
    np.testing.assert_array_equal(load_model(str(tmp_path)).logits(TOKENS), expected)
    # PEFT's own file holds the same keys and values.
    read.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert set(again) == set(written)
    assert all(np.array_equal(again[key], written[key]) for key in written)


def test_gradients_of_the_adapter_equal_pefts(tiny_llama, torch_llama, tmp_path):
    from flax import nnx

    from jaxft.training.state import divide

    base = tiny_llama("tied")
    reference = by_peft(torch_llama, base, tmp_path, target_modules="all-linear")
    reference.train()
    reference(torch.tensor(TOKENS)).logits.square().sum().backward()
    expected = {
        name.replace(".default", ""): p.grad.numpy() for name, p in reference.named_parameters() if p.requires_grad
    }
    loaded = load_model(str(tmp_path))
    graphdef, trainable, frozen = divide(loaded.module)

    def total(trainable):
        module = nnx.merge(graphdef, trainable, frozen)
        return (module.unembed(module(TOKENS)[0]) ** 2).sum()

    nnx.update(loaded.module, jax.jit(jax.grad(total))(trainable))
    write_adapter(loaded.module, str(tmp_path / "grads"), base=base)
    written = load_file(tmp_path / "grads" / "adapter_model.safetensors")
    assert set(written) == set(expected)
    for name, grad in expected.items():
        np.testing.assert_allclose(written[name], grad, rtol=1e-4, atol=1e-4 * np.abs(grad).max(), err_msg=name)


@pytest.fixture
def folder(tiny_llama, tmp_path):
    """A small folder of ours, to be damaged."""
    write_adapter(ours(tiny_llama("plain"), target_modules="q_proj").module, str(tmp_path), base=tiny_llama("plain"))
    return tmp_path


def edit_tensors(folder, change):
    path = os.path.join(folder, "adapter_model.safetensors")
    save_file(change(load_file(path)), path)


def edit_config(folder, **fields):
    path = os.path.join(folder, "adapter_config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file) | fields
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file)


A, B = (f"base_model.model.model.layers.1.self_attn.q_proj.lora_{side}.weight" for side in "AB")
DAMAGE = {
    "wrong prefix": (lambda t: {k.replace("base_model.model.", "model."): v for k, v in t.items()}, "6 of 6 tensors"),
    "one foreign key": (lambda t: t | {"base_model.model.lm_head.weight": t[A]}, r"rows and lm_head.weight 4"),
    "layer that is not there": (
        lambda t: t | {A.replace("layers.1", "layers.9"): t[A]}, "name no layer .*among them.*layers.9"
    ),
    "dora": (lambda t: t | {A.replace("lora_A.weight", "lora_magnitude_vector"): t[A]}, "unexpected .*magnitude"),
    "missing half": (lambda t: {k: v for k, v in t.items() if k != B}, r"missing .*layers.1.*lora_B.weight \[32, 4\]"),
    "missing layer": (lambda t: {k: v for k, v in t.items() if k not in (A, B)}, r"missing .*layers.1.*lora_A"),
    "misshapen": (lambda t: t | {A: t[A][:3].copy()}, r"misshapen .*: file \[3, 32\], model \[4, 32\]"),
    "a tensor of another model": (
        lambda t: t | {"base_model.model.model.rotary.weight": t[A]}, r"unexpected model\.rotary\.weight \[4, 32\]"
    ),
    "a misshapen norm": (
        lambda t: t | {"base_model.model.model.norm.weight": np.zeros(31, np.float32)},
        r"misshapen model\.norm\.weight: file \[31\], base \[32\]",
    ),
    "nothing": (lambda t: {}, "0 of 0 tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_tensors_that_do_not_fit_are_refused(folder, tiny_llama, name):
    change, message = DAMAGE[name]
    edit_tensors(folder, change)
    module = load_model(tiny_llama("plain")).module
    with pytest.raises(CheckpointError, match=message):
        read_adapter(module, str(folder))
    assert not adapters(module)


def test_all_misfits_are_listed_at_once(folder, tiny_llama):
    edit_tensors(folder, lambda t: {k: v for k, v in t.items() if k != B} | {A: t[A][:3].copy()})
    with pytest.raises(CheckpointError, match=r"(?s)missing .*lora_B.*misshapen .*lora_A"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bias": "some"}, "bias='some'"),
        ({"rank_pattern": {"q_proj": "8"}}, "'q_proj': '8'.* must be an object of numbers"),
        ({"rank_pattern": {"q_proj": 2.5}}, "r=2.5; a rank is a whole number"),
        ({"layers_to_transform": [0], "layers_pattern": "h"}, "layers_pattern='h'"),
        ({"lora_bias": True, "use_dora": True}, "lora_bias beside use_dora"),
        ({"twist": 3}, "twist=3"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA', which is not implemented"),
        ({"r": "16"}, "r='16'; a rank is a whole number"),
        ({"r": 0}, "r=0; a rank is a whole number above zero"),
        ({"r": None}, "r=None"),
    ],
)
def test_settings_that_are_not_implemented_are_refused(folder, fields, message):
    edit_config(folder, **fields)
    with pytest.raises(ModelError, match=message):
        load_model(str(folder))


def test_the_refusal_of_an_unknown_setting_says_what_to_do_and_that_works(folder):
    edit_config(folder, twist=3)
    with pytest.raises(
        ModelError, match=r"twist=3(.|\n)*merge_and_unload(.|\n)*can be removed from adapter_config.json"
    ):
        load_model(str(folder))
    path = os.path.join(folder, "adapter_config.json")
    with open(path, encoding="utf-8") as file:
        config = {name: value for name, value in json.load(file).items() if name != "twist"}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file)
    load_model(str(folder))


def test_five_keys_are_a_config_and_absent_ones_have_pefts_defaults():
    bare = {
        "peft_type": "LORA",
        "r": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "x",
        "task_type": None,
    }
    settings, theirs = read_settings(bare), peft.LoraConfig(r=4)
    assert (settings.alpha, settings.dropout, settings.use_rslora) == (theirs.lora_alpha, theirs.lora_dropout, False)


def test_every_default_that_peft_writes_is_understood(tmp_path):
    peft.LoraConfig(r=4, target_modules=["q_proj"]).save_pretrained(tmp_path)
    assert read_settings(json.loads((tmp_path / "adapter_config.json").read_text())).r == 4


def test_a_base_that_pissa_would_change_is_not_taken_as_it_is(tiny_llama, torch_llama, tmp_path):
    # PEFT subtracts from the base's weights when it loads such a folder; plain LoRA would compute something else.
    by_peft(torch_llama, tiny_llama("plain"), tmp_path, init_lora_weights="pissa", target_modules=["q_proj"])
    with pytest.raises(ModelError, match="init_lora_weights='pissa'"):
        load_model(str(tmp_path))


def test_a_model_without_adapter_has_none_to_write(tiny_llama, tmp_path):
    with pytest.raises(ModelError, match="no adapter to write"):
        write_adapter(load_model(tiny_llama("plain")).module, str(tmp_path), base="x")


def test_a_folder_without_weights_is_refused(folder):
    os.remove(folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="adapter_model.safetensors"):
        load_model(str(folder))
    shutil.copy(folder / "adapter_config.json", folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="never opens pickle"):
        load_model(str(folder))
