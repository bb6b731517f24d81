"""DPO as a whole run: it learns, resumes bit for bit, keeps its reference, is the same on 8 devices, and is planned."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft import api
from jaxft.config import RunConfig, load
from jaxft.errors import ConfigError
from jaxft.hardware.topology import parse
from jaxft.methods import dpo, method_of
from jaxft.optim.make import make_schedule
from jaxft.planning.job import abstract_step_of, measure, sharded_step_of
from jaxft.planning.shapes import shapes_of
from jaxft.runs.build import abstract_model, build_model, make_mesh, make_step, make_tx, start_state
from jaxft.training.log import TIMING_KEYS
from jaxft.training.state import saved_part, with_saved

KINDS = {"lora": {}, "full": {"adapter.kind": "none", "export.merged": False}}
ROWS = [{"prompt": f"Colour {n}?", "chosen": f" {n % 3} red", "rejected": f" {n % 5} blue, or not"} for n in range(24)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def config_of(rows, output_dir, **overrides) -> RunConfig:
    settings = {
        "output_dir": str(output_dir), "method.name": "dpo", "data.train": rows, "data.eval": rows,
        "data.limit": None, "data.eval_limit": 4, "data.max_length": 128, "train.batch_size": 8, "train.steps": 6,
        "train.accumulation_steps": 1, "train.eval_every": 3, "train.log_every": 1, "checkpoint.every": 3,
        "eval.metric": None, "adapter.dropout": 0.0, "export.merged": False, "optim.learning_rate": 1e-2,
    }  # fmt: skip
    return load("configs/quickstart.py:smoke", settings | overrides)


def metrics_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING_KEYS} for line in lines]


def weights_of(folder):
    (file,) = [*folder.glob("adapter/*.safetensors"), *folder.glob("model/*.safetensors")]
    return file.read_bytes()


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_run_learns_and_resumes_bit_for_bit(rows, tmp_path, kind):
    config = config_of(rows, tmp_path / "run", **KINDS[kind])
    summary = api.train(config)
    folder = tmp_path / "run"
    lines = metrics_of(folder)
    first, last = lines[0], [line for line in lines if "loss" in line][-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and first["rewards/margins"] == pytest.approx(
        0, abs=1e-4
    )
    assert last["loss"] < 0.6 and last["rewards/accuracies"] > 0.7 and last["rewards/margins"] > 0.1
    assert last["logps/chosen"] < 0 and last["rewards/chosen"] > last["rewards/rejected"]
    assert summary["eval_loss"] < 0.6 and summary["eval_rewards/accuracies"] > 0.5
    # The state of step 6 is lost; the run goes on from step 3.
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    shutil.rmtree(folder / "checkpoints" / "6")
    api.train(config)
    assert weights_of(folder) == weights_of(whole) and metrics_of(folder) == metrics_of(whole)
    # jaxft eval finds the same reference: the base, not the weights that it evaluates.
    evaluated = api.evaluate(api.load_model(str(folder)), api.load_tokenizer(str(folder)), config)
    for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
        assert evaluated[name] == pytest.approx(summary[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("kind", KINDS)
def test_eight_devices_equal_one(rows, tmp_path, kind):
    # Plain gradient steps: Adam's first one would be the sign of gradients that are zero but for rounding.
    sgd = {
        "optim.name": "sgd", "optim.adamw.b2": 0.999, "optim.sgd.momentum": 0.0, "optim.learning_rate": 1.0,
        "optim.clip_norm": None,
    }  # fmt: skip
    config = config_of(rows, tmp_path / "run", **KINDS[kind] | sgd)
    method = method_of(config)
    tokenizer = api.load_tokenizer(config.model.path)
    batch = method.source(config, method.prepare(config, tokenizer), tokenizer).batch(0)
    base = build_model(config, random_base=tmp_path / "base").module
    schedule = make_schedule(config.optim, 6)
    outcomes = []
    for axes in ({"fsdp": 1}, {"data": 2, "fsdp": 2, "tensor": 2}):
        one = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **axes))
        model = abstract_model(one)
        mesh = make_mesh(one, model, jax.devices()[: 8 if "tensor" in axes else 1])
        module = nnx.merge(*nnx.split(base))
        tx = make_tx(one, module, schedule)
        graphdef, state = start_state(one, module, tx, mesh)
        # Away from the reference, so that the loss has something to say.
        moved = jax.tree.map(lambda x: x + 0.02 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), state.trainable)
        step = jax.jit(mesh.bind(make_step(one, model, graphdef, tx, schedule)))
        outcomes.append(step(state._replace(trainable=moved), jax.device_put(batch, mesh.batch_sharding())))
    (state, metrics), (other, other_metrics) = outcomes
    assert abs(metrics["rewards/margins"]) > 1e-4
    for name, value in metrics.items():
        np.testing.assert_allclose(other_metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(other.trainable), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5)


def test_the_reference_of_full_fine_tuning_is_not_saved_and_comes_from_the_base(rows, tmp_path):
    config = config_of(rows, tmp_path / "run", **KINDS["full"])
    model = build_model(config, random_base=tmp_path / "base").module
    schedule = make_schedule(config.optim, 6)
    _, state = start_state(config, model, make_tx(config, model, schedule))
    kept = saved_part(state)
    assert set(kept) == {"step", "trainable", "opt_state", "key"}
    moved = with_saved(state, kept | {"trainable": jax.tree.map(lambda x: x + 1, state.trainable)})
    for a, b in zip(jax.tree.leaves(moved.method.rebuilt), jax.tree.leaves(state.trainable), strict=True):
        np.testing.assert_array_equal(a, b)


def test_saved_numbers_of_a_method_go_into_checkpoints(rows, tmp_path):
    from jaxft.objectives.loss import MethodState

    config = config_of(rows, tmp_path / "run")
    model = build_model(config, random_base=tmp_path / "base").module
    _, state = start_state(config, model, make_tx(config, model, make_schedule(config.optim, 6)))
    assert state.method is None
    state = state._replace(method=MethodState(saved={"coefficient": jnp.float32(0.25)}))
    kept = saved_part(state)
    assert float(kept["method"]["coefficient"]) == 0.25
    back = with_saved(state._replace(method=MethodState(saved={"coefficient": jnp.float32(9)})), kept)
    assert float(back.method.saved["coefficient"]) == 0.25


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"adapter.kind": "prompt"}, r"adapter.kind='prompt' puts virtual tokens into every row"),
        ({"adapter.modules_to_save": "norm"}, r"adapter.modules_to_save='norm' trains modules of the base itself"),
        (
            {"model.quantization": "nf4", "adapter.init_lora_weights": "loftq"},
            r"init_lora_weights='loftq' starts from an adapter that corrects the quantised base",
        ),
        ({"adapter.dropout": 0.1}, r"adapter.dropout=0.1 would change the policy's log-probabilities but not the ref"),
        ({"data.truncation": "right"}, r"data.truncation='right' would cut the rejected answer"),
        ({"data.format": "messages"}, r"data.format='messages' .* reads rows of prompt, chosen and rejected"),
        ({"data.train_on": "all"}, r"data.train_on='all'"),
    ],
)
def test_settings_that_it_cannot_train_with_are_refused(rows, tmp_path, overrides, message):
    config = config_of(rows, tmp_path / "run", **overrides)
    with pytest.raises(ConfigError, match=message):
        dpo.check(config, abstract_model(config))


def test_settings_of_another_method_are_refused(rows, tmp_path):
    with pytest.raises(ConfigError, match=r"method.dpo.beta"):
        config_of(rows, tmp_path, **{"method.name": "sft", "method.dpo.beta": 0.3})
    with pytest.raises(ConfigError, match=r"Did you mean 'dpo'|is not one of sft, dpo"):
        config_of(rows, tmp_path, **{"method.name": "dop"})


PLANNED = {"sft": {"method.name": "sft"}, "dpo": {}, "full": KINDS["full"]}


def test_the_reference_is_in_estimates_of_plans(rows, tmp_path):
    """With an adapter the reference is work; with all weights it is memory, too."""
    steps, costs = {}, {}
    for name, changes in PLANNED.items():
        config = config_of(rows, tmp_path, **changes)
        hf_config, _ = shapes_of(config)
        topology = parse("h100:1", 1)
        steps[name] = sharded_step_of(abstract_step_of(config, hf_config, 6), config, topology)
        costs[name] = measure(steps[name], "O1")
    assert 1.2 < steps["dpo"].model_flops / steps["sft"].model_flops < 1.6
    assert costs["dpo"].costs.flops > 1.2 * costs["sft"].costs.flops
    parts = steps["full"].parts()
    assert steps["dpo"].parts().method == 0 and parts.method == parts.weights
    assert costs["full"].memory.arguments == parts.total


@pytest.mark.slow
def test_it_is_planned_for_a_tpu(rows, tmp_path):
    pytest.importorskip("libtpu")
    plans = {name: api.plan(config_of(rows, tmp_path, **one), "v5e:1x1") for name, one in PLANNED.items()}
    assert plans["dpo"]["steps"] == 6 and plans["dpo"]["fits"] and plans["full"]["fits"]
    assert plans["dpo"]["hardware_flops_per_step"] > 1.2 * plans["sft"]["hardware_flops_per_step"]
    assert plans["full"]["argument_parts"]["method"] == plans["full"]["argument_parts"]["weights"]
