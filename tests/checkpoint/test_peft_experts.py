"""LoRA on experts: fresh, merged, on eight devices as on one, and in PEFT, which fuses what we write."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from jaxft import models
from jaxft.adapters.attach import AdapterParam, merge
from jaxft.adapters.make import attach_adapter
from jaxft.checkpoint.load import load_model
from jaxft.checkpoint.merged import MergedSource
from jaxft.checkpoint.peft import write_adapter
from jaxft.checkpoint.peft.experts import split_stacked, targets_of
from jaxft.checkpoint.peft.lora import adapter_config_fields
from jaxft.checkpoint.tensors import SafetensorsFolder, TensorSpec
from jaxft.config import AdapterConfig, MeshConfig, resolve
from jaxft.errors import CheckpointError, ModelError
from jaxft.nn.storage import storage_dims_of
from jaxft.runs.build import abstract_of
from jaxft.sharding.mesh import make_mesh_plan
from jaxft.training.state import divide

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
    "initializer_range": 0.2, "max_position_embeddings": 128,
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 96, (8, 12))
CONFIG = AdapterConfig(r=4, alpha=8.0, target_modules="q_proj,gate_proj,up_proj,down_proj")


def as_if_trained(module):
    leaves, treedef = jax.tree.flatten(nnx.state(module, AdapterParam))
    drawn = [x + 0.1 * jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(leaves)]
    nnx.update(module, jax.tree.unflatten(treedef, drawn))


def logits_of(module):
    return np.asarray(jax.jit(lambda: module.unembed(module(TOKENS)[0]))())


@functools.cache
def module_of():
    module = models.random_model(models.config_from_hf({"model_type": "mixtral"} | SIZES), seed=0)
    before = logits_of(module)
    attach_adapter(module, CONFIG, 0)
    np.testing.assert_array_equal(logits_of(module), before)
    as_if_trained(module)
    assert np.abs(logits_of(module) - before).max() > 0.1
    return module


def test_only_one_half_of_what_peft_fuses_is_refused():
    module = models.random_model(models.config_from_hf({"model_type": "mixtral"} | SIZES), seed=0)
    attach_adapter(module, dataclasses.replace(CONFIG, target_modules="q_proj,up_proj,down_proj"), 0)
    with pytest.raises(ModelError, match="down_proj, up_proj has one of them: name both"):
        adapter_config_fields(module)


def test_merged_equals_unmerged():
    module = nnx.merge(*nnx.split(module_of()))
    apart = logits_of(module)
    merge(module)
    np.testing.assert_allclose(logits_of(module), apart, rtol=0, atol=2e-5)


def gradient(mesh=None):
    graphdef, trainable, frozen = divide(module_of())

    def total(trainable, frozen, tokens):
        module = nnx.merge(graphdef, trainable, frozen)
        return (module.unembed(module(tokens)[0]) ** 2).mean()

    compute = jax.value_and_grad(total)
    if mesh is None:
        return jax.jit(compute)(trainable, frozen, TOKENS)
    trainable, frozen = mesh.shard((trainable, frozen), storage_dims_of(module_of()))
    given = trainable, frozen, jax.device_put(TOKENS, mesh.batch_sharding())
    return jax.jit(mesh.bind(compute))(*given)


@pytest.mark.parametrize(
    "axes", [{"fsdp": 2, "expert": 4}, {"fsdp": 8}, {"fsdp": 1, "expert": 2, "context": 2, "tensor": 2}]
)
def test_eight_devices_equal_one(axes):
    ours, one = gradient(make_mesh_plan(MeshConfig(**axes))), functools.cache(gradient)()
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_peft_computes_the_same(tmp_path):
    torch = pytest.importorskip("torch")
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, attn_implementation="eager")
    reference = transformers.MixtralForCausalLM._from_config(config, dtype=torch.float32).eval()
    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    reference.save_pretrained(base)
    live, before = load_model(base), load_model(base).logits(TOKENS)
    attach_adapter(live.module, CONFIG, 0)
    as_if_trained(live.module)
    write_adapter(live.module, adapter, base=base)
    expected = live.logits(TOKENS)
    np.testing.assert_allclose(load_model(adapter).logits(TOKENS), expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(reference, adapter)(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(expected - before).max() > 0.1
    np.testing.assert_allclose(theirs, expected, rtol=0, atol=1e-4)
    merge(live.module)
    kernel = np.asarray(live.module.layers[0].mlp.up_proj.kernel.get_value())
    streamed = MergedSource(SafetensorsFolder(base), adapter)
    for layer in range(2):
        for expert in range(4):
            read = streamed.read(f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight")
            np.testing.assert_allclose(read, kernel[layer, expert].T, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora is not for experts"),
        ({"dropout": 0.1}, r"adapter.dropout=0.1 does not reach experts"),
    ],
)
def test_what_experts_do_not_have_is_refused(config, message):
    module = models.random_model(models.config_from_hf({"model_type": "mixtral"} | SIZES), seed=0)
    with pytest.raises(ModelError, match=message):
        attach_adapter(module, AdapterConfig(r=4, target_modules="up_proj", **config), 0)


def peft_of(kind, folder, targets):
    """(torch, a PEFT model on experts in one parameter, moved and saved in folder/adapter, its base in folder/base)."""
    torch = pytest.importorskip("torch")
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = SIZES | ({"head_dim": 8} if kind == "GptOss" else {})
    config = getattr(transformers, f"{kind}Config")(**sizes, attn_implementation="eager")
    base = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, dtype=torch.float32).eval()
    base.save_pretrained(folder / "base")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "init_lora_weights": False}
    base.config._name_or_path = base.name_or_path = str(folder / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(**settings, target_parameters=targets, task_type="CAUSAL_LM"))
    model.save_pretrained(folder / "adapter")
    with torch.no_grad():
        return peft, transformers, model.eval()(torch.tensor(TOKENS)).logits.numpy()


BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
OF_GRANITE = [name.replace("mlp", "block_sparse_moe") for name in BOTH]


@pytest.mark.parametrize(
    ("kind", "targets"),
    [("Mixtral", BOTH), ("Mixtral", BOTH[1:]), ("GptOss", BOTH), ("GptOss", BOTH[:1]), ("GraniteMoe", OF_GRANITE)],
)
def test_folders_of_pefts_with_experts_in_one_parameter(tmp_path, kind, targets):
    peft, transformers, expected = peft_of(kind, tmp_path, targets)
    import torch

    base = str(tmp_path / "base")
    loaded = load_model(str(tmp_path / "adapter"))
    np.testing.assert_allclose(loaded.logits(TOKENS), expected, rtol=0, atol=1e-4)
    assert np.abs(load_model(base).logits(TOKENS) - expected).max() > 0.02
    write_adapter(loaded.module, str(tmp_path / "again"), base=base)
    reference = getattr(transformers, f"{kind}ForCausalLM").from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        again = peft.PeftModel.from_pretrained(reference, str(tmp_path / "again")).eval()
        theirs = again(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(theirs, expected, rtol=0, atol=1e-4)


def test_other_parameters_are_refused():
    with pytest.raises(ModelError, match=r"target_parameters=\['mlp.gate.weight'\]: only experts'"):
        targets_of({"target_parameters": ["mlp.gate.weight"]})


def test_patterns_beside_parameters_and_experts_of_another_rank_are_refused():
    config = {"target_parameters": BOTH, "r": 4}
    with pytest.raises(ModelError, match="rank_pattern beside target_parameters"):
        targets_of(config | {"rank_pattern": {"q_proj": 8}})
    names = ["model.layers.0.mlp.experts.0.gate_proj.weight"]
    with pytest.raises(ModelError, match=r"target_parameters beside target_modules='.\*proj'; give a list"):
        split_stacked(config | {"target_modules": ".*proj"}, None, names)

    class Source:
        def specs(self):
            key = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
            return {key: TensorSpec((6, 32), np.dtype(np.float32))}

    with pytest.raises(CheckpointError, match=r"lora_A.weight \[6, 32\] does not hold experts of rank 4"):
        split_stacked(config, Source(), names)


def test_ranks_of_their_own_have_no_place_among_experts_in_one_parameter():
    sizes = SIZES | {"model_type": "gpt_oss", "head_dim": 8}
    module = models.random_model(models.config_from_hf(sizes), seed=0)
    config = AdapterConfig(r=4, target_modules="q_proj,down_proj", rank_pattern="q_proj:2")
    attach_adapter(module, config, 0)
    with pytest.raises(ModelError, match="one rank for all layers: drop adapter.rank_pattern"):
        adapter_config_fields(module)
    run = {
        "model": {"path": "m"},
        "data": {"train": "t.jsonl", "max_length": 64},
        "adapter": dataclasses.asdict(config),
    }
    with pytest.raises(ModelError, match="one rank for all layers: drop adapter.rank_pattern"):
        abstract_of(sizes, resolve(run))  # before any weight is read
