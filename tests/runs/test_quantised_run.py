"""A run on a quantised base: trained, resumed, evaluated and exported as users do it."""

import json

import numpy as np
import pytest

import jaxft
from jaxft import cli
from jaxft.checkpoint.load import load_model
from jaxft.checkpoint.verify import probe
from jaxft.errors import ConfigError
from jaxft.nn.quantized import has_quantized_kernels
from jaxft.runs.export import load_trained

CONFIG = "configs/llama3_1_8b_qlora.py:smoke"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder whose adapter has moved far enough to be seen."""
    folder = tmp_path_factory.mktemp("qlora") / "run"
    overrides = {"output_dir": str(folder), "optim.learning_rate": 0.02, "train.steps": 6, "export.merged": True}
    overrides["train.accumulation_steps"] = 1
    summary = jaxft.train(jaxft.get_config(CONFIG, overrides))
    return folder, summary


def test_every_export_is_read_back(run):
    folder, summary = run
    for name in ("adapter", "merged"):
        assert max(summary[f"{name}_checks"].values()) < 1e-4
    assert not has_quantized_kernels(load_model(str(folder / "merged")).module)


def test_the_trained_model_has_a_quantised_base(run):
    folder, _ = run
    trained = load_trained(str(folder))
    assert has_quantized_kernels(trained.module) and trained.quantization == "nf4-dq"
    tokens = probe(trained.module.config.vocab_size)
    served = load_model(str(folder / "adapter"), quantization="nf4-dq").logits(tokens)
    np.testing.assert_allclose(served, trained.logits(tokens), atol=1e-5)


def test_export_says_what_merging_loses(run, tmp_path):
    folder, _ = run
    whole = jaxft.export(str(folder), str(tmp_path / "whole"))
    assert max(whole["checks"].values()) < 1e-4
    # The adapter's part is rounded to 16 levels, the base's is on them already.
    assert 1e-4 < whole["quantised_again"]["mean"] < whole["quantised_again"]["max"]
    other = jaxft.export(str(folder), str(tmp_path / "other"), base="original")
    assert 1e-4 < other["original_base"]["mean"] < other["original_base"]["max"]
    tokens = probe(259)
    expected = load_model(str(folder / "adapter")).logits(tokens)
    np.testing.assert_allclose(load_model(str(tmp_path / "other")).logits(tokens), expected, atol=1e-5)


def test_the_original_base_is_for_quantised_runs(run, tmp_path):
    with pytest.raises(ConfigError, match="whose base was quantised, and this base was not"):
        jaxft.export(str(run[0] / "merged"), str(tmp_path / "x"), base="original")


def test_commands_take_a_format(run, capsys):
    command = ["generate", f"--model={run[0] / 'adapter'}", "--quantization=nf4-dq", "--prompt=refund", "--json"]
    assert cli.main([*command, "--max_new_tokens=3"]) == 0
    assert len(json.loads(capsys.readouterr().out)["answers"]) == 1


def test_a_quantised_base_cannot_be_trained_whole():
    with pytest.raises(ConfigError, match="Quantized weights are frozen, but adapter.kind='none' trains every weight"):
        jaxft.get_config(CONFIG, {"adapter.kind": "none"})
