"""The LoRA family against PEFT: what its folders compute, their gradients, merged either way, and written again."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxft.adapters.attach import AdapterParam, adapters
from jaxft.adapters.make import attach_adapter
from jaxft.checkpoint.hf import hf_tensors
from jaxft.checkpoint.load import load_model
from jaxft.checkpoint.merged import MergedSource
from jaxft.checkpoint.peft import write_adapter
from jaxft.checkpoint.tensors import SafetensorsFolder
from jaxft.config import AdapterConfig
from jaxft.errors import CheckpointError
from jaxft.training.state import divide

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 12))
WEIGHTS = "adapter_model.safetensors"


def by_peft(torch_llama, base, folder, *, seed=0, **settings):
    """A PEFT model all of whose trained parameters are moved, and its folder."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | settings
    model = peft.get_peft_model(torch_llama(base), peft.LoraConfig(**settings))
    moved(model)
    model.save_pretrained(folder)
    return model


def moved(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


def torch_logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def torch_gradients(model):
    model.eval()  # no dropout
    model.zero_grad()
    model(torch.tensor(TOKENS)).logits.square().sum().backward()
    found = {name: p.grad.numpy() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return {name.replace(".default", "").replace(".modules_to_save", ""): grad for name, grad in found.items()}


def our_gradients(loaded, folder):
    """The gradients under PEFT's names: written where the values would be."""
    graphdef, trainable, frozen = divide(loaded.module)

    def total(trainable):
        module = nnx.merge(graphdef, trainable, frozen)
        return (module.unembed(module(TOKENS)[0]) ** 2).sum()

    grads = nnx.merge(graphdef, jax.jit(jax.grad(total))(trainable), frozen)
    write_adapter(grads, str(folder), base=loaded.base)
    return load_file(folder / WEIGHTS)


def assert_same_gradients(ours, theirs):
    theirs = {name.removesuffix(".weight") if "magnitude" in name else name: grad for name, grad in theirs.items()}
    # A tied table is one parameter there and two tensors in a folder.
    assert set(ours) - {"base_model.model.lm_head.weight"} == set(theirs) - {"base_model.model.lm_head.weight"}
    for name, grad in theirs.items():
        np.testing.assert_allclose(ours[name], grad, rtol=1e-4, atol=1e-4 * np.abs(grad).max(), err_msg=name)


CASES = {
    "dora": ("biases", {"target_modules": "all-linear", "use_dora": True, "lora_dropout": 0.1}),
    "dora, one layer": ("plain", {"target_modules": ["v_proj"], "use_dora": True, "layers_to_transform": [1]}),
    "patterns": (
        "plain",
        {
            "target_modules": ["q_proj", "o_proj", "up_proj"],
            "rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\.up_proj": 2},
            "alpha_pattern": {"o_proj": 3},
            "use_rslora": True,
        },
    ),
    "layers": ("tied", {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}),
    "excluded": ("plain", {"target_modules": r".*_proj", "exclude_modules": ["v_proj", "layers.0.mlp.up_proj"]}),
    "saved": ("biases", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm", "k_proj"]}),
    "saved, tied": (
        "tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    ),
    "embeddings": ("plain", {"target_modules": ["embed_tokens", "lm_head", "k_proj"], "rank_pattern": {"k_proj": 2}}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_folder_of_pefts_computes_trains_merges_and_is_written_as_peft_does(tiny_llama, torch_llama, tmp_path, name):
    variant, settings = CASES[name]
    base = tiny_llama(variant)
    reference = by_peft(torch_llama, base, tmp_path / "theirs", **settings)
    expected = torch_logits(reference)
    loaded = load_model(str(tmp_path / "theirs"))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(loaded.logits(TOKENS), expected, rtol=0, atol=1e-5 * scale)
    assert np.abs(expected - load_model(base).logits(TOKENS)).max() > 0.01 * scale
    assert_same_gradients(our_gradients(loaded, tmp_path / "grads"), torch_gradients(reference))
    # Written again: the same numbers, and PEFT computes the same.
    write_adapter(loaded.module, str(tmp_path / "ours"), base=base)
    theirs, ours = (load_file(tmp_path / folder / WEIGHTS) for folder in ("theirs", "ours"))
    theirs = {key: value for key, value in theirs.items() if ".base_layer." not in key}
    assert set(ours) == set(theirs)
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    again = peft.PeftModel.from_pretrained(torch_llama(base), str(tmp_path / "ours"))
    np.testing.assert_allclose(torch_logits(again), expected, rtol=0, atol=1e-5 * scale)
    # Merged in memory, and while the files are read.
    merged = {key: make() for key, (_, make) in hf_tensors(loaded.module).items()}
    stream = MergedSource(SafetensorsFolder(base), tmp_path / "theirs")
    assert set(stream.specs()) == set(merged)
    for key, tensor in reference.merge_and_unload().state_dict().items():
        if key in merged:
            np.testing.assert_allclose(merged.pop(key), tensor.numpy(), rtol=0, atol=1e-5, err_msg=key)
            np.testing.assert_allclose(stream.read(key), tensor.numpy(), rtol=0, atol=1e-5, err_msg=key)
            if tensor.ndim == 2:
                part = stream.read(key, (slice(1, 9), slice(2, 7)))
                np.testing.assert_allclose(part, tensor.numpy()[1:9, 2:7], rtol=0, atol=1e-5, err_msg=key)
    assert not merged


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_that_peft_takes_from_the_base(tiny_llama, torch_llama, tmp_path, init):
    base = tiny_llama("plain")
    live, before = load_model(base), load_model(base).logits(TOKENS)
    config = AdapterConfig(r=4, alpha=8.0, target_modules="q_proj,down_proj", init_lora_weights=init)
    attach_adapter(live.module, config, 0)
    np.testing.assert_allclose(live.logits(TOKENS), before, rtol=0, atol=2e-5)
    settings = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": init}
    reference = peft.get_peft_model(
        torch_llama(base), peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)
    )
    # Singular vectors have no sign of their own: A and B are PEFT's from here on.
    state, started = reference.state_dict(), adapters(live.module)
    for path, adapter in started.items():
        name = (
            path.replace("layers/0", "base_model.model.model.layers.{i}").replace("/", ".")
            + ".lora_{half}.default.weight"
        )
        a, b = (np.stack([state[name.format(i=i, half=half)].numpy() for i in range(3)]) for half in "AB")
        delta = np.einsum("lri,lor->lio", a, b)
        mine = np.einsum("lri,lro->lio", adapter.lora_a.get_value(), adapter.lora_b.get_value())
        np.testing.assert_allclose(mine, delta, rtol=0, atol=1e-5 * np.abs(delta).max() + 1e-5)
        for value in (adapter.lora_a, adapter.lora_a_start):
            value.set_value(a)
        for value in (adapter.lora_b, adapter.lora_b_start):
            value.set_value(b.swapaxes(-1, -2))
    torch.manual_seed(0)
    moved(reference)
    state = {key.replace(".default", ""): value.numpy() for key, value in reference.state_dict().items()}
    for path, adapter in started.items():
        name = path.replace("layers/0", "base_model.model.model.layers.{i}").replace("/", ".") + ".lora_{half}.weight"
        a, b = (np.stack([state[name.format(i=i, half=half)] for i in range(3)]) for half in "AB")
        adapter.lora_a.set_value(a)
        adapter.lora_b.set_value(b.swapaxes(-1, -2))
    expected = torch_logits(reference)
    np.testing.assert_allclose(live.logits(TOKENS), expected, rtol=0, atol=5e-5)
    assert np.abs(expected - before).max() > 0.1
    # In PEFT on the untouched base: of twice the rank.
    write_adapter(live.module, str(tmp_path), base=base)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 8
    again = peft.PeftModel.from_pretrained(torch_llama(base), str(tmp_path))
    np.testing.assert_allclose(torch_logits(again), expected, rtol=0, atol=5e-5)
    gradients, theirs = our_gradients(live, tmp_path / "grads"), torch_gradients(reference)
    for name, grad in theirs.items():
        mine = gradients[name][:4] if "lora_A" in name else gradients[name][:, :4]
        np.testing.assert_allclose(mine, grad, rtol=1e-3, atol=1e-3 * np.abs(grad).max(), err_msg=name)


def written(base, folder, **config):
    """Our adapter as if trained, written."""
    live = load_model(base)
    attach_adapter(live.module, AdapterConfig(**{"r": 4, "alpha": 8.0} | config), 0)
    state = nnx.state(live.module, AdapterParam)
    leaves, treedef = jax.tree.flatten(state)
    drawn = [x + 0.1 * jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(leaves)]
    nnx.update(live.module, jax.tree.unflatten(treedef, drawn))
    write_adapter(live.module, str(folder), base=base)
    return live


@pytest.mark.parametrize(
    ("variant", "config", "fields"),
    [
        (
            "plain",
            {"layers_to_transform": "1", "rank_pattern": "q_proj:2", "use_dora": True, "exclude_modules": "up_proj"},
            {"use_dora": True, "rank_pattern": {"q_proj": 2}},
        ),
        (
            "plain",
            {"target_modules": "q_proj", "alpha_pattern": "layers.1.self_attn.q_proj:2", "init_lora_weights": "olora"},
            {"r": 8, "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 4.0}},
        ),
        ("tied", {"modules_to_save": "embed_tokens,input_layernorm"}, {"ensure_weight_tying": True}),
        ("plain", {"target_modules": "embed_tokens,q_proj", "modules_to_save": "lm_head"}, {"use_dora": False}),
    ],
)
def test_what_we_write_gives_our_logits_in_peft(tiny_llama, torch_llama, tmp_path, variant, config, fields):
    base = tiny_llama(variant)
    live = written(base, tmp_path, **config)
    expected = live.logits(TOKENS)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {name: said[name] for name in fields} == fields
    read = peft.PeftModel.from_pretrained(torch_llama(base), str(tmp_path))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(torch_logits(read), expected, rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(load_model(str(tmp_path)).logits(TOKENS), expected, rtol=0, atol=1e-5 * scale)
    assert np.abs(expected - load_model(base).logits(TOKENS)).max() > 0.01 * scale


def edited(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def test_layers_that_the_settings_select_must_be_there(tiny_llama, tmp_path):
    written(tiny_llama("plain"), tmp_path, target_modules="q_proj", layers_to_transform="1")
    assert load_model(str(tmp_path))
    edited(tmp_path, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match=r"missing .*layers\.0\.self_attn\.q_proj\.lora_A"):
        load_model(str(tmp_path))
    edited(tmp_path, target_modules=["q_proj"], layers_to_transform=[0])
    with pytest.raises(CheckpointError, match=r"unexpected .*layers\.1\.self_attn\.q_proj\.lora_A"):
        load_model(str(tmp_path))


def test_a_tied_table_that_is_there_twice_must_be_one(tiny_llama, tmp_path):
    written(tiny_llama("tied"), tmp_path, target_modules="q_proj", modules_to_save="embed_tokens")
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.lm_head.weight"] + 1
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="differ, but in the base they are one"):
        load_model(str(tmp_path))
