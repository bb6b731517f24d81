"""Reward models as whole runs: they learn, resume bit for bit, are the same on 8 devices, and are planned."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from pair_runs import evaluate_export

from jaxft import api
from jaxft.config import RunConfig, load
from jaxft.errors import ConfigError, DataError
from jaxft.hardware.topology import parse
from jaxft.methods import method_of, reward
from jaxft.optim.make import make_schedule
from jaxft.planning.job import abstract_step_of, measure, sharded_step_of
from jaxft.planning.shapes import shapes_of
from jaxft.runs.build import abstract_model, build_model, make_mesh, make_step, make_tx, start_state
from jaxft.training.log import TIMING_KEYS
from jaxft.training.state import divide
from jaxft.trees import flatten

KINDS = {
    "lora": {},
    "full": {"adapter.kind": "none", "export.merged": False},
    "qlora": {"model.quantization": "nf4"},
    # One layer's MLP moves the scores less in a step than the others do, so it gets more steps.
    "part": {"adapter.kind": "none", "model.trainable": "layers.1.mlp", "train.steps": 12},
}
ROWS = [
    {"prompt": f"Colour {n}?", "chosen": f" {n % 3} red", "rejected": f" {n % 5} blue, or not", "margin": n % 2 / 2}
    for n in range(24)
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def config_of(rows, output_dir, **overrides) -> RunConfig:
    settings = {
        "output_dir": str(output_dir), "method.name": "reward", "data.train": rows, "data.eval": rows,
        "data.limit": None, "data.eval_limit": 4, "data.max_length": 128, "train.batch_size": 8, "train.steps": 6,
        "train.accumulation_steps": 1, "train.eval_every": 3, "train.log_every": 1, "checkpoint.every": 3,
        "eval.metric": None, "export.merged": False, "optim.learning_rate": 1e-2,
        "method.reward.margin_coefficient": 1.0,
    }  # fmt: skip
    return load("configs/quickstart.py:smoke", settings | overrides)


def metrics_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING_KEYS} for line in lines]


def weights_of(folder):
    (file,) = [*folder.glob("adapter/*.safetensors"), *folder.glob("model/*.safetensors")]
    return file.read_bytes()


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("full", "qlora", "part")]


@pytest.mark.parametrize("kind", ["lora", *SLOW])
def test_a_run_learns_and_resumes_bit_for_bit(rows, tmp_path, kind):
    config = config_of(rows, tmp_path / "run", **KINDS[kind])
    summary = api.train(config)
    folder = tmp_path / "run"
    lines = metrics_of(folder)
    first, last = lines[0], [line for line in lines if "loss" in line][-1]
    # The score head starts at 0; margins of 0 and 1/2 alternate.
    assert first["margin"] == first["max_reward"] == first["accuracy"] == 0
    assert math.log(2) < first["loss"] < math.log1p(math.exp(0.5))
    assert last["accuracy"] > 0.7 and last["margin"] > 0.1
    assert last["min_reward"] < last["mean_reward"] < last["max_reward"]
    assert summary["eval_accuracy"] > 0.5 and summary["eval_margin"] > 0.1
    # The state of the last step is lost; the run goes on from the checkpoint before it.
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    shutil.rmtree(folder / "checkpoints" / str(config.train.steps))
    api.train(config)
    assert weights_of(folder) == weights_of(whole) and metrics_of(folder) == metrics_of(whole)
    # The export is loaded with its score head.
    evaluated = evaluate_export(config)
    for name in ("eval_loss", "eval_accuracy", "eval_margin"):
        assert evaluated[name] == pytest.approx(summary[name], rel=1e-4, abs=1e-5), name


def first_steps(config, base, meshes):
    """(state, metrics) after a step from the same weights, on each mesh: axes -> number of devices."""
    method, tokenizer = method_of(config), api.load_tokenizer(config.model.path)
    batch = method.source(config, method.prepare(config, tokenizer), tokenizer).batch(0)
    schedule = make_schedule(config.optim, 6)
    for changes, axes in meshes:
        train = dataclasses.replace(config.train, **changes)
        one = dataclasses.replace(config, train=train, mesh=dataclasses.replace(config.mesh, **axes))
        model = abstract_model(one)
        mesh = make_mesh(one, model, jax.devices()[: math.prod(axes.values())])
        module = nnx.merge(*nnx.split(base))
        # Away from zeros, so that every parameter has a gradient.
        weight = module.value.weight
        weight.set_value(0.1 * jax.random.normal(jax.random.key(1), weight.get_value().shape))
        tx = make_tx(one, module, schedule)
        graphdef, state = start_state(one, module, tx, mesh)
        step = jax.jit(mesh.bind(make_step(one, model, graphdef, tx, schedule)))
        yield step(state, jax.device_put(batch, mesh.batch_sharding()))


@pytest.mark.parametrize("kind", ["lora", "full", pytest.param("qlora", marks=pytest.mark.slow)])
def test_eight_devices_and_four_micro_batches_equal_one(rows, tmp_path, kind):
    # Plain gradient steps: Adam's first one would be the sign of gradients that are zero but for rounding.
    sgd = {
        "optim.name": "sgd", "optim.adamw.b2": 0.999, "optim.sgd.momentum": 0.0, "optim.learning_rate": 1.0,
        "optim.clip_norm": None, "adapter.dropout": 0.0, "method.reward.center_rewards_coefficient": 0.1,
    }  # fmt: skip
    config = config_of(rows, tmp_path / "run", **KINDS[kind] | sgd)
    base = build_model(config, random_base=tmp_path / "base").module
    one = {"fsdp": 1}
    ways = [({}, one), ({}, {"data": 2, "fsdp": 2, "tensor": 2}), ({"accumulation_steps": 4}, one)]
    (state, metrics), *others = first_steps(config, base, ways)
    assert abs(metrics["margin"]) > 1e-4
    for other, other_metrics in others:
        # The extremes are those of micro-batches.
        for name in set(metrics) - ({"min_reward", "max_reward"} if other is others[1][0] else set()):
            np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=1e-4, atol=1e-5, err_msg=name)
        for a, b in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(other.trainable), strict=True):
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_head_is_trained_and_there_is_no_lm_head(rows, tmp_path, kind):
    model = abstract_model(config_of(rows, tmp_path, **KINDS[kind]))
    _, trainable, frozen = divide(model)
    paths = set(flatten(trainable)[0])
    assert "value/weight" in paths and not any("lm_head" in path for path in paths | set(flatten(frozen)[0]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"adapter.kind": "prompt"}, r"adapter.kind='prompt' puts virtual tokens into every row"),
        ({"adapter.modules_to_save": "score"}, r"adapter.modules_to_save names score, which a reward model always"),
        ({"eval.metric": "exact_match"}, r"eval.metric='exact_match' has held-out prompts answered, but a reward"),
        ({"data.truncation": "right"}, r"data.truncation='right' would cut the rejected answer"),
    ],
)
def test_settings_that_it_cannot_train_with_are_refused(rows, tmp_path, overrides, message):
    config = config_of(rows, tmp_path / "run", **overrides)
    with pytest.raises(ConfigError, match=message):
        reward.check(config, None)


def test_margins_of_rows_may_be_scaled_or_left_out(rows, tmp_path):
    """Rows have margins of 0 and 1/2."""
    losses = {}
    for factor in (0.0, 1.0, 2.0):
        config = config_of(rows, tmp_path, **{"method.reward.margin_coefficient": factor})
        tokenizer = api.load_tokenizer(config.model.path)
        batch = reward.METHOD.source(config, reward.METHOD.prepare(config, tokenizer), tokenizer).batch(0)
        model = build_model(config, random_base=tmp_path / "base").module
        sums = reward.loss(config, model)(model, jax.tree.map(jax.numpy.asarray, batch), None, None)
        losses[factor] = float(sums.means()["loss"])
        margins_BP = batch.values["margin"][:, ::2][batch.segments_BS.max(1)[:, None] > 2 * np.arange(64 // 2)]
        assert losses[factor] == pytest.approx(np.log1p(np.exp(factor * margins_BP)).mean(), rel=1e-5)
    assert losses[0.0] == pytest.approx(math.log(2), rel=1e-6) and losses[0.0] < losses[1.0] < losses[2.0]


def test_margins_are_refused_unless_the_config_says_what_becomes_of_them(rows, tmp_path):
    config = config_of(rows, tmp_path, **{"method.reward.margin_coefficient": None})
    tokenizer = api.load_tokenizer(config.model.path)
    with pytest.raises(
        DataError, match=r"have margins \(0 to 0.5, median .*margin_coefficient=1 to use them as they are"
    ):
        reward.METHOD.prepare(config, tokenizer)


def test_a_plan_has_no_vocabulary_products(rows, tmp_path):
    """Neither FLOPs nor memory of an LM head."""
    steps = {}
    for name in ("sft", "reward"):
        changes = {"method.name": name, "method.reward.margin_coefficient": None, "data.train": "x", "data.eval": None}
        config = config_of(rows, tmp_path, **changes)
        hf_config, _ = shapes_of(config)
        steps[name] = sharded_step_of(abstract_step_of(config, hf_config, 6), config, parse("h100:1", 1))
    sizes, scored = steps["sft"].sizes, steps["reward"].sizes
    assert (sizes.vocab, scored.vocab) == (259, 0)
    assert sizes.active - scored.active == 259 * sizes.width and scored.adapter == sizes.adapter
    assert scored.trainable - sizes.trainable == sizes.width
    assert steps["reward"].model_flops < steps["sft"].model_flops
    assert measure(steps["reward"], "O1").memory.temporaries < measure(steps["sft"], "O1").memory.temporaries
