"""Runs with model.add_tokens: what is trained, exported, read by PEFT and transformers, resumed and refused."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from jaxft import api
from jaxft.assets import ASSETS
from jaxft.config import load
from jaxft.errors import ConfigError, DataError, ModelError
from jaxft.runs.build import abstract_model, build_model
from jaxft.runs.train import set_up, train

TOKENS = ("<call>", "</call>")
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"Call {n}"},
            {"role": "assistant", "content": f"<call>f({n % 3})</call>"},
        ]
    }
    for n in range(12)
]


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """The folder of a small random model, with its tables tied or not."""

    @functools.cache
    def make(tied):
        source = tmp_path_factory.mktemp("sizes") / "model"
        shutil.copytree(ASSETS / "smoke", source)
        fields = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(fields | {"tie_word_embeddings": tied}))
        folder = source.parent / "base"
        build_model(load("configs/quickstart.py:smoke", {"model.path": str(source)}), random_base=folder)
        return folder

    return make


@pytest.fixture
def base(base_of):
    return base_of(True)


def config_of(base, folder, **overrides):
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = {
        "output_dir": str(folder / "run"), "model.path": str(base), "model.random_init": False,
        "model.add_tokens": ",".join(TOKENS), "data.train": str(rows), "data.eval": None, "data.limit": None,
        "data.max_length": 96, "data.packing": False, "train.batch_size": 8, "train.accumulation_steps": 1,
        "train.steps": 3, "train.eval_every": None, "checkpoint.every": None, "eval.metric": None,
        "optim.learning_rate": 1e-2, "optim.weight_decay": 0.0, "adapter.dropout": 0.0, "export.merged": True,
    }  # fmt: skip
    return load("configs/quickstart.py:smoke", settings | overrides)


def run(base, folder, **overrides):
    config = config_of(base, folder, **overrides)
    train(config, console=Console(quiet=True))
    return folder / "run"


def tables(folder):
    file = load_file(folder / "model.safetensors")
    return {name: file[name] for name in ("model.embed_tokens.weight", "lm_head.weight") if name in file}


PROMPT = "Call 1 <call>f(1)</call>"


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["untied", "tied"])
def test_lora_trains_the_new_rows_alone_and_peft_reads_them(base_of, tmp_path, tied):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = base_of(tied)
    folder = run(base, tmp_path)
    before, after = tables(base), tables(folder / "merged")
    rows = len(before["model.embed_tokens.weight"])
    grown = -(-(rows + 2) // 64) * 64
    assert set(before) == set(after)
    for name, table in after.items():
        assert table.shape[0] == grown
        np.testing.assert_array_equal(table[:rows], before[name])
        known = before[name][:rows].astype(np.float64)
        moved = np.abs(table[rows:] - known.mean(0)) / known.std(0)
        assert moved[:2].max() > 1e-2  # trained
        assert 0 < moved[2:].max() < 1e-4  # spare
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    ids = tokenizer(PROMPT)["input_ids"]
    assert ids[-1] == rows + 1 and rows in ids
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs.resize_token_embeddings(grown)
    theirs = peft.PeftModel.from_pretrained(theirs, folder / "adapter").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.numpy()
    live = api.load_model(str(folder))
    np.testing.assert_allclose(live.logits([ids]), expected, atol=1e-4 * np.abs(expected).max())
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        np.testing.assert_allclose(
            merged(torch.tensor([ids])).logits.numpy(), expected, atol=1e-4 * np.abs(expected).max()
        )
    assert api.load_tokenizer(str(folder)).encode("<call>") == [rows]


@pytest.mark.slow
def test_full_fine_tuning_trains_the_grown_tables(base_of, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    base = base_of(False)
    folder = run(base, tmp_path, **{"adapter.kind": "none", "export.merged": False})
    before, after = tables(base), tables(folder / "model")
    rows = len(before["model.embed_tokens.weight"])
    assert json.loads((folder / "model" / "config.json").read_text())["vocab_size"] == len(
        after["model.embed_tokens.weight"]
    )
    assert np.abs(after["model.embed_tokens.weight"][rows] - before["model.embed_tokens.weight"].mean(0)).max() > 1e-3
    ids = AutoTokenizer.from_pretrained(folder / "model")(PROMPT)["input_ids"]
    theirs = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(api.load_model(str(folder)).logits([ids]), expected, atol=1e-4 * np.abs(expected).max())


def test_a_run_is_resumed_with_the_same_bits(base, tmp_path):
    whole = run(base, tmp_path, **{"checkpoint.every": 2})
    expected = load_file(whole / "adapter" / "adapter_model.safetensors")
    (whole / "checkpoints" / "3").rename(tmp_path / "taken")
    (whole / "summary.json").unlink()
    shutil.rmtree(whole / "adapter")
    again = load_file(run(base, tmp_path, **{"checkpoint.every": 2}) / "adapter" / "adapter_model.safetensors")
    assert set(again) == set(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(again[key], value)


def test_abstract_and_loaded_models_agree_on_a_mesh_too(base, tmp_path):
    config = config_of(base, tmp_path)
    shapes = jax.tree.map(lambda x: x.shape, nnx.to_pure_dict(nnx.state(abstract_model(config))))
    run_of = set_up(config)
    sharded = build_model(config, run_of.mesh)
    assert jax.tree.map(lambda x: x.shape, nnx.to_pure_dict(nnx.state(sharded.module))) == shapes
    alone = build_model(config)
    for ours, theirs in zip(
        jax.tree.leaves(nnx.state(sharded.module)), jax.tree.leaves(nnx.state(alone.module)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    assert "2 tokens were added, and the model's tables grew from" in sharded.notes[-1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.add_tokens": "<call>,<call>"}, "'<call>' is named twice"),
        ({"model.add_tokens": "<|im_end|>"}, r"'<\|im_end\|>' is a token of .* already, with the id"),
        ({"adapter.target_modules": "all-linear,embed_tokens"}, "which is the LM head too"),
        (
            {"adapter.kind": "none", "model.trainable": "layers.0"},
            r"model.trainable='layers.0' does not train embed_tokens.*: add embed_tokens",
        ),
        ({"adapter.kind": "prompt"}, "model.add_tokens"),
    ],
)
def test_settings_that_contradict_it_are_refused(base, tmp_path, overrides, message):
    with pytest.raises((ConfigError, ModelError), match=message):
        set_up(config_of(base, tmp_path, **overrides))


def test_a_table_with_an_adapter_is_refused(base_of, tmp_path):
    with pytest.raises(ModelError, match="embed_tokens has an adapter and single rows that are trained"):
        set_up(config_of(base_of(False), tmp_path, **{"adapter.target_modules": "all-linear,embed_tokens"}))


def test_rows_without_it_are_refused_with_the_setting_that_helps(base, tmp_path):
    grown = tmp_path / "grown"
    shutil.copytree(base, grown)
    tokenizer = AutoTokenizer.from_pretrained(grown)
    tokenizer.add_tokens(list(TOKENS))
    tokenizer.save_pretrained(grown)
    with pytest.raises(DataError, match=r"model.add_tokens='<call>,</call>'"):
        set_up(config_of(grown, tmp_path, **{"model.add_tokens": None}))
    found = set_up(config_of(grown, tmp_path))
    assert found.tokenizer.added is not None and found.tokenizer.added.grows
