"""Training goes on from a PEFT folder: with its adapter and settings, or with a new one on the merged model."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import jaxft
from jaxft import models
from jaxft.adapters.attach import AdapterParam, adapters
from jaxft.adapters.make import attach_adapter
from jaxft.adapters.token_rows import attach_token_rows
from jaxft.assets import ASSETS
from jaxft.checkpoint import hf
from jaxft.checkpoint.hf import hf_tensors
from jaxft.checkpoint.load import load_model
from jaxft.checkpoint.peft import write_adapter
from jaxft.config import AdapterConfig, with_overrides
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.errors import ConfigError
from jaxft.methods import method_of
from jaxft.methods.parts.reference import check_reference, reference_model, reference_state
from jaxft.planning.shapes import shapes_of
from jaxft.runs.build import abstract_model, build_model
from jaxft.runs.going_on import describe, going_on
from jaxft.training.state import divide
from jaxft.trees import flatten

SMOKE = ASSETS / "smoke"
TOKENS = np.random.default_rng(0).integers(0, 200, (2, 8))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("base"))
    hf_config = json.loads((SMOKE / "config.json").read_text())
    model = models.random_model(models.config_from_hf(hf_config), seed=0)
    hf.write_weights(model, folder)
    hf.write_config(folder, hf_config, dtype="float32")
    load_tokenizer(SMOKE).save(folder)
    return folder


def trained_folder(base, folder, rows=(), **settings):
    """The folder of an adapter as if trained."""
    loaded = load_model(base)
    attach_adapter(loaded.module, AdapterConfig(**settings), 0)
    if rows:
        attach_token_rows(loaded.module, {"embed_tokens": rows})
    state = nnx.state(loaded.module, AdapterParam)
    leaves, treedef = jax.tree.flatten(state)
    drawn = [x + 0.1 * jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(leaves)]
    nnx.update(loaded.module, jax.tree.unflatten(treedef, drawn))
    write_adapter(loaded.module, str(folder), base=base)
    return str(folder)


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory):
    return trained_folder(
        base, tmp_path_factory.mktemp("lora"), rows=(5, 9), r=3, alpha=7.0, dropout=0.05,
        target_modules="q_proj,down_proj", modules_to_save="norm",
    )  # fmt: skip


def config_of(folder, **settings):
    data = {"data.train": str(SMOKE / "pairs.jsonl"), "data.max_length": 64}
    return with_overrides({"model.path": folder, **data, **settings})


def test_the_settings_are_the_folders(lora):
    config = going_on(config_of(lora))
    adapter = config.adapter
    assert (adapter.r, adapter.alpha, adapter.target_modules, adapter.modules_to_save) == (
        3, 7.0, "down_proj,q_proj", "norm",
    )  # fmt: skip
    assert going_on(config) == config
    # Settings that agree with the folder may be repeated; dropout is of the run.
    same = {"adapter.r": 3, "adapter.target_modules": "q_proj,down_proj", "adapter.dropout": 0.1}
    assert going_on(config_of(lora, **same)).adapter == dataclasses.replace(adapter, dropout=0.1)
    assert "Its dropout was 0.05; adapter.dropout is 0.0 in this run" in describe(config)[0]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"adapter.r": 8, "adapter.use_dora": True},
            r"adapter\.r=8 \(there 3\), adapter\.use_dora=True \(there F",
        ),
        ({"adapter.target_modules": "q_proj"}, r"adapter\.target_modules='q_proj' \(there 'down_proj,q_proj'\)"),
        ({"adapter.kind": "vera"}, r"adapter\.kind='vera' \(there 'lora'\).*model\.adapter='merge'"),
        ({"adapter.init_lora_weights": "pissa"}, r"adapter\.init_lora_weights='pissa'.*model\.adapter='merge'"),
        ({"adapter.kind": "none"}, r"adapter\.kind='none' trains the whole model.*model\.adapter='merge'"),
    ],
)
def test_other_settings_are_refused_by_name(lora, settings, match):
    with pytest.raises(ConfigError, match=match):
        going_on(config_of(lora, **settings))


def test_a_model_that_is_no_adapter_is_not_merged(base):
    with pytest.raises(ConfigError, match=r"model\.adapter='merge', but model\.path .* is not a PEFT folder"):
        going_on(config_of(base, **{"model.adapter": "merge"}))


def test_an_adapter_on_the_head_is_no_start_of_a_reward_model(base, tmp_path):
    folder = trained_folder(base, tmp_path, r=2, target_modules="q_proj", modules_to_save="embed_tokens")
    config = config_of(folder, **{"method.name": "reward"})
    assert "lm_head" in (tmp_path / "adapter_model.safetensors").read_bytes()[:2000].decode(errors="ignore")
    with pytest.raises(ConfigError, match="trains a model without an LM head"):
        going_on(config)


def test_a_run_begins_with_the_folders_adapter(lora, base, tmp_path):
    config = going_on(config_of(lora, **{"adapter.dropout": 0.1}))
    loaded, expected = build_model(config), load_model(lora)
    ours, theirs = (flatten(nnx.state(module))[0] for module in (loaded.module, expected.module))
    assert all(np.array_equal(ours[path], theirs[path]) for path in theirs) and set(ours) == set(theirs)
    assert {each.settings.dropout for each in adapters(loaded.module).values()} == {0.1}
    trained = set(flatten(divide(loaded.module)[1])[0])
    assert {"norm/scale", "token_rows/embed_tokens/values"} < trained
    assert all("lora" in path for path in trained - {"norm/scale", "token_rows/embed_tokens/values"})
    shapes = {path: leaf.shape for path, leaf in flatten(divide(abstract_model(config))[1])[0].items()}
    assert shapes == {path: ours[path].shape for path in trained}
    # Written as it is read.
    write_adapter(loaded.module, str(tmp_path), base=base)
    again, before = (load_file(f"{folder}/adapter_model.safetensors") for folder in (tmp_path, lora))
    assert set(again) == set(before) and all(np.array_equal(again[key], before[key]) for key in before)


def test_a_fresh_score_head_is_trained_beside_the_adapter(base, tmp_path):
    folder = trained_folder(base, tmp_path, r=2, target_modules="q_proj")
    config = going_on(config_of(folder, **{"method.name": "reward"}))
    for module in (build_model(config).module, abstract_model(config)):
        assert "value/weight" in flatten(divide(module)[1])[0]


@pytest.mark.parametrize("method", ["dpo", "kto", "grpo", "rloo", "ppo", "online_dpo"])
def test_every_method_with_a_reference_keeps_the_start(base, tmp_path, method):
    folder = trained_folder(base, tmp_path, r=2, target_modules="q_proj")
    settings = {"method.name": method} | ({} if method in ("dpo", "kto") else {"rewards.functions": "rewards.py:exact"})
    settings |= {"method.grpo.beta": 0.1} if method == "grpo" else {}
    config = going_on(config_of(folder, **settings))
    shapes = divide(abstract_model(config))[1]
    state = jax.eval_shape(lambda x: method_of(config).initial_state(config, x), shapes)
    assert set(flatten(state.rebuilt)[0]) == set(flatten(shapes)[0])
    fresh = config_of(base, **settings)
    state = jax.eval_shape(lambda x: method_of(fresh).initial_state(fresh, x), divide(abstract_model(fresh))[1])
    assert state is None or state.rebuilt is None, "the reference of a fresh adapter is the base itself"


def test_the_reference_is_the_start_of_the_adapter(lora):
    config = going_on(config_of(lora, **{"method.name": "dpo"}))
    check_reference(config)
    module = build_model(config).module
    _, trainable, _ = divide(module)
    start = load_model(lora).logits(TOKENS)
    state = reference_state(config, jax.tree.map(lambda x: x, trainable))
    nnx.update(module, jax.tree.map(lambda x: x + 1, trainable))
    reference = reference_model(module, state)
    ours, theirs = flatten(nnx.state(reference))[0], flatten(nnx.state(load_model(lora).module))[0]
    assert all(np.array_equal(ours[path], theirs[path]) for path in theirs)
    assert np.isfinite(start).all()


def test_on_top_of_the_merged_adapter(lora, base, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxft.conversion.targets.LOGITS_LIMIT", 0)  # they are compared elsewhere
    config = going_on(config_of(lora, **{"model.adapter": "merge", "adapter.r": 2}))
    assert config.adapter.r == 2 and config.adapter.target_modules == "all-linear"
    loaded = build_model(config, random_base=tmp_path / "merged")
    assert loaded.base == str(tmp_path / "merged") and loaded.adapter is None
    expected = {name: make() for name, (_, make) in hf_tensors(load_model(lora).module).items()}
    merged = {name: make() for name, (_, make) in hf_tensors(loaded.module).items()}
    for name, value in expected.items():
        np.testing.assert_allclose(merged[name], value, rtol=0, atol=1e-6, err_msg=name)
    assert len(adapters(abstract_model(config))) == len(adapters(loaded.module)) > 2


def test_the_base_may_be_elsewhere(lora, base, tmp_path):
    moved = tmp_path / "adapter"
    shutil.copytree(lora, moved)
    path = moved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "C:\\models\\base"}))
    (moved / "tokenizer.json").unlink(missing_ok=True)
    config = config_of(str(moved), **{"model.base": base})
    assert going_on(config).adapter.r == 3 and shapes_of(config)[0]["vocab_size"] > 0
    assert load_tokenizer(moved, base=base).backend.get_vocab() == load_tokenizer(base).backend.get_vocab()
    assert build_model(going_on(config)).base == base


@pytest.mark.slow
def test_a_run_resumes_exactly_and_its_export_is_read_alike(lora, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Say {i}.", "completion": f"It is {i}."}) + "\n" for i in range(64)))
    settings = {
        "data.train": str(rows), "data.format": "auto", "train.batch_size": 8, "checkpoint.every": 2,
        "data.packing": False, "adapter.dropout": 0.1, "optim.learning_rate": 1e-2,
    }  # fmt: skip

    def trained(name, **steps):
        jaxft.train(config_of(lora, **settings, **steps, output_dir=str(tmp_path / name)))
        return load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")

    whole = trained("whole", **{"train.steps": 4})
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "4")
    cut = trained("cut", **{"train.steps": 4})
    assert all(np.array_equal(cut[key], whole[key]) for key in whole)
    assert any(not np.array_equal(whole[key], load_file(f"{lora}/adapter_model.safetensors")[key]) for key in whole)
    again = load_model(str(tmp_path / "whole"))
    assert again.base == load_model(lora).base
