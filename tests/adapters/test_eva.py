"""EVA against principal components of what transformers gives the layers, and PEFT's; on eight devices as on one."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxft import config as config_module
from jaxft.adapters.attach import adapters
from jaxft.adapters.lora import eva
from jaxft.adapters.make import attach_adapter
from jaxft.checkpoint.load import load_model
from jaxft.config import AdapterConfig, MeshConfig
from jaxft.data.batch import Batch
from jaxft.errors import ModelError
from jaxft.runs import train as train_module
from jaxft.runs.build import abstract_of
from jaxft.sharding.arrays import put_global
from jaxft.sharding.mesh import make_mesh_plan

BATCHES = 2
TARGETS = "q_proj,o_proj,down_proj"
LENGTHS = (24, 17, 20, 9, 24, 24, 13, 22)
TOKENS = np.random.default_rng(0).integers(1, 96, (BATCHES, len(LENGTHS), max(LENGTHS)))


@pytest.fixture(autouse=True)
def few_batches(monkeypatch):
    monkeypatch.setattr(eva, "BATCHES", BATCHES)


def batch(number, mesh):
    """Rows of several lengths, padded."""
    positions = np.broadcast_to(np.arange(TOKENS.shape[-1], dtype=np.int32), TOKENS.shape[1:])
    segments = (positions < np.array(LENGTHS)[:, None]).astype(np.int32)
    tokens = TOKENS[number].astype(np.int32)
    given = Batch(tokens, tokens, segments.astype(np.float32), positions, segments)
    return jax.tree.map(lambda x: put_global(jnp.asarray(x), mesh.batch_sharding()), given)


def begun(folder, init="eva_niter_40", mesh=None, **settings):
    """The module with LoRA begun so."""
    mesh = mesh or make_mesh_plan(MeshConfig(fsdp=1), jax.devices()[:1])
    loaded = load_model(folder, mesh=mesh)
    adapter = AdapterConfig(**{"r": 4, "target_modules": TARGETS, "init_lora_weights": init} | settings)
    attach_adapter(loaded.module, adapter, 0)
    mesh.shard_module(loaded.module)
    eva.initialize_eva(loaded.module, init, lambda number: batch(number, mesh), mesh, jax.random.key(1))
    return loaded


def inputs_of(model, names):
    """What transformers gives each of the named layers, [tokens, I] without padding, over all batches."""
    torch = pytest.importorskip("torch")
    found = {name: [] for name in names}
    mask = torch.arange(TOKENS.shape[-1])[None] < torch.tensor(LENGTHS)[:, None]
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: found[name].append(given[0].detach()[mask].numpy())
        )
        for name in names
    ]
    with torch.no_grad():
        for tokens in TOKENS:
            model(torch.tensor(tokens), attention_mask=mask.long())
    for hook in hooks:
        hook.remove()
    return {name: np.concatenate(rows) for name, rows in found.items()}


NAMES = [
    f"model.layers.{i}.{end}" for i in range(3) for end in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
]


def a_of(module, name):
    """A of a layer, by its name in transformers."""
    _, _, layer, *rest = name.split(".")
    found = {path: adapter for path, adapter in adapters(module).items() if path.endswith("/".join(rest))}
    (adapter,) = found.values()
    return np.asarray(adapter.lora_a.get_value())[int(layer)]


def test_a_is_the_principal_components_of_what_a_layer_is_given(tiny_llama, torch_llama):
    folder = tiny_llama("biases")
    loaded = begun(folder)
    for name, rows in inputs_of(torch_llama(folder), NAMES).items():
        _, _, components = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
        ours = a_of(loaded.module, name)
        alike = np.sum(ours * components[:4], axis=1)
        np.testing.assert_allclose(np.abs(alike), 1, atol=1e-4, err_msg=name)
    tokens = TOKENS[0]
    np.testing.assert_array_equal(loaded.logits(tokens), load_model(folder).logits(tokens))  # B is zero


def test_few_steps_find_nearly_all_of_the_variance_that_the_best_find(tiny_llama, torch_llama):
    folder = tiny_llama("biases")
    loaded = begun(folder, "eva")
    for name, rows in inputs_of(torch_llama(folder), NAMES).items():
        rows = rows - rows.mean(0)
        _, sizes, _ = np.linalg.svd(rows, full_matrices=False)
        held = np.square(rows @ a_of(loaded.module, name).T).sum()
        assert 0.95 * np.square(sizes[:4]).sum() < held <= 1.0001 * np.square(sizes[:4]).sum(), name


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pefts_eva_finds_the_same(tiny_llama, torch_llama, monkeypatch):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    theirs = importlib.import_module("peft.tuners.lora.eva")
    components = theirs.IncrementalPCA  # of which PEFT takes an approximation by random numbers
    monkeypatch.setattr(theirs, "IncrementalPCA", lambda **given: components(**given | {"lowrank": False}))
    folder = tiny_llama("biases")
    settings = peft.EvaConfig(rho=1.0, tau=0.9999)
    lora = peft.LoraConfig(r=4, target_modules=TARGETS.split(","), init_lora_weights="eva", eva_config=settings)
    model = peft.get_peft_model(torch_llama(folder), lora, low_cpu_mem_usage=True)
    mask = (torch.arange(TOKENS.shape[-1])[None] < torch.tensor(LENGTHS)[:, None]).long()
    # All tokens in one batch, again and again: else its incremental decomposition forgets what a batch had beyond r.
    tokens = torch.tensor(TOKENS.reshape(-1, TOKENS.shape[-1]))
    given = {"input_ids": tokens, "attention_mask": mask.repeat(BATCHES, 1)}
    peft.initialize_lora_eva_weights(model, [given] * 20)
    module = begun(folder).module
    for name in NAMES:
        theirs = model.get_submodule(f"base_model.model.{name}").lora_A["default"].weight.detach().numpy()
        np.testing.assert_allclose(np.abs(np.sum(a_of(module, name) * theirs, 1)), 1, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 2, "context": 2}])
def test_eight_devices_find_what_one_finds(tiny_llama, axes):
    folder = tiny_llama("plain")
    one, eight = begun(folder, "eva_niter_3"), begun(folder, "eva_niter_3", make_mesh_plan(MeshConfig(**axes)))
    for path, adapter in adapters(one.module).items():
        ours, theirs = (np.asarray(x.lora_a.get_value()) for x in (adapter, adapters(eight.module)[path]))
        np.testing.assert_allclose(np.abs(np.sum(ours * theirs, -1)), 1, atol=1e-4, err_msg=path)


def test_layers_of_other_ranks_and_those_left_out(tiny_llama):
    loaded = begun(tiny_llama("plain"), rank_pattern="layers.1.self_attn.q_proj:2", layers_to_transform="1-2")
    first, second, third = (
        np.abs(a_of(loaded.module, f"model.layers.{i}.self_attn.q_proj")).sum(1) > 0 for i in range(3)
    )
    assert first.tolist() == [False] * 4 and second.tolist() == [True, True, False, False] and third.all()


@pytest.mark.parametrize(("targets", "path"), [("q_proj,lm_head", "lm_head"), ("q_proj,embed_tokens", "embed_tokens")])
def test_what_is_not_in_the_layers_is_refused_before_weights_are_read(targets, path):
    sizes = {
        "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128, "tie_word_embeddings": False,
    }  # fmt: skip
    adapter = AdapterConfig(r=4, target_modules=targets, init_lora_weights="eva")
    run = {"model": {"path": "m"}, "data": {"train": "t.jsonl", "max_length": 64}}
    run["adapter"] = dataclasses.asdict(adapter)
    with pytest.raises(ModelError, match=f"eva' needs the inputs of matrices within the layers, and {path} is not one"):
        abstract_of(sizes, config_module.resolve(run))


def test_directions_of_a_large_model_fit_a_mesh_that_splits_weights():
    """The sums of inputs, [32, 4096], are whole on every device although they are a big array."""
    path = "layers/0/self_attn/q_proj/adapter"
    dims = {f"{path}/{name}": storage for name, storage in eva.directions_storage("outputs").items()}
    shapes = eva.Directions(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((32, 24, 4096), (32, 4096))))
    shardings = make_mesh_plan(MeshConfig(fsdp=8)).shardings({path: shapes}, dims)[path]
    assert shardings.lora_a.spec == P(None, None, "fsdp")
    assert shardings.total.spec == P()


def test_a_run_begins_so_and_goes_on_without(tmp_path, monkeypatch):
    less = {"eval.metric": None, "export.adapter": False, "export.merged": False, "train.steps": 2}
    more = {"output_dir": str(tmp_path), "adapter.init_lora_weights": "eva"}
    run = config_module.load("configs/quickstart.py:smoke", less | more)
    looked, initialize_eva = [], eva.initialize_eva
    monkeypatch.setattr(eva, "initialize_eva", lambda *given: (looked.append(given[1]), initialize_eva(*given)))
    train_module.train(run)
    assert looked == ["eva"]
    train_module.train(run)
    assert looked == ["eva"]
