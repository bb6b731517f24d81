"""DPO as a whole run: it learns, resumes bit for bit, keeps its reference, is the same on 8 devices, and is planned."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pair_runs
import pytest
from pair_runs import (
    KINDS,
    SGD,
    assert_eight_devices_equal_one,
    evaluate_export,
    train_lose_the_end_and_resume,
    write_rows,
)

from jaxft import api
from jaxft.errors import ConfigError
from jaxft.hardware.topology import parse
from jaxft.methods import dpo
from jaxft.optim.make import make_schedule
from jaxft.planning.job import abstract_step_of, measure, sharded_step_of
from jaxft.planning.shapes import shapes_of
from jaxft.runs.build import abstract_model, build_model, make_tx, start_state
from jaxft.training.state import saved_part, with_saved

config_of = partial(pair_runs.config_of, "dpo")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize("kind", ["lora", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("full", "qlora"))])
def test_a_run_learns_and_resumes_bit_for_bit(rows, tmp_path, kind):
    config = config_of(rows, tmp_path / "run", **KINDS[kind])
    (first, *_, last), summary = train_lose_the_end_and_resume(config, tmp_path / "run")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and first["rewards/margins"] == pytest.approx(
        0, abs=1e-4
    )
    assert last["loss"] < 0.6 and last["rewards/accuracies"] > 0.7 and last["rewards/margins"] > 0.1
    assert last["logps/chosen"] < 0 and last["rewards/chosen"] > last["rewards/rejected"]
    assert summary["eval_loss"] < 0.6 and summary["eval_rewards/accuracies"] > 0.5
    # jaxft eval finds the same reference: the base, not the weights that it evaluates.
    evaluated = evaluate_export(config)
    for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
        assert evaluated[name] == pytest.approx(summary[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("kind", ["lora", "full", pytest.param("qlora", marks=pytest.mark.slow)])
def test_eight_devices_equal_one(rows, tmp_path, kind):
    """Also where a row is split over devices, and with it the tokens that are counted within a pair."""
    more = {"method.dpo.ld_alpha": 0.5} | ({"method.dpo.sft_weight": 0.5} if kind == "lora" else {})
    axes = ("fsdp", "context", "tensor") if kind == "lora" else ("data", "fsdp", "tensor")
    config = config_of(rows, tmp_path / "run", **KINDS[kind] | SGD | more)
    assert abs(assert_eight_devices_equal_one(config, tmp_path, axes)["rewards/margins"]) > 1e-4


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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_type": "sigmoid,hinje"}, r"'hinje' is not one of sigmoid, robust, hinge.*Did you mean 'hinge'"),
        ({"loss_type": "sft"}, r"loss_type='sft' must name at least one loss of pairs"),
        ({"loss_type": "ipo,ipo"}, r"loss_type='ipo,ipo' must name .* none twice"),
        ({"loss_weights": "1,2"}, r"loss_weights='1,2' has 2 numbers for the 1 losses of method.dpo.loss_type='sigmo"),
        ({"loss_weights": "much"}, r"loss_weights='much': 'much' is not a number above zero"),
        ({"loss_weights": "-1"}, r"loss_weights='-1': '-1' is not a number above zero"),
        ({"loss_type": "hinge,ipo", "label_smoothing": 0.1}, r"label_smoothing=0.1 is read by none .* only by sigmoid"),
        ({"loss_type": "exo_pair"}, r"'exo_pair' compares with smoothed labels.*must be above 0"),
        ({"loss_type": "sigmoid,sft", "sft_weight": 0.1}, r"sft_weight=0.1 and 'sft' in .* are the same term twice"),
        ({"ld_alpha": 0.5, "loss_type": "sigmoid_norm"}, r"ld_alpha=0.5 corrects .*loss_type='sigmoid_norm' divides"),
        ({"ld_alpha": 0.5, "loss_type": "hinge,ipo"}, r"ld_alpha=0.5 corrects .*loss_type='ipo' divides"),
        ({"ld_alpha": 1.5}, r"ld_alpha=1.5 must be from 0 to 1"),
        (
            {"sft_weight": 1.0, "use_weighting": True},
            r"use_weighting=True weighs pairs, but the negative log-likelihoo",
        ),
        (
            {"loss_type": "sigmoid,apo_zero,nca_pair", "f_divergence_type": "forward_kl"},
            r"f_divergence_type='forward_kl' is defined .*loss_type='apo_zero' and 'nca_pair' takes each answer",
        ),
        ({"f_alpha_divergence_coef": 0.7}, r"f_alpha_divergence_coef=0.7 is read only if"),
        (
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
            r"f_alpha_divergence_coef=1.0 makes the divergence the reverse KL divergence",
        ),
    ],
)
def test_losses_that_contradict_each_other_are_refused(rows, tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        config_of(rows, tmp_path, **{f"method.dpo.{name}": value for name, value in fields.items()})


def test_losses_are_read_from_text(rows, tmp_path):
    own = config_of(
        rows, tmp_path, **{"method.dpo.loss_type": "sigmoid, sft", "method.dpo.loss_weights": "0.5,2"}
    ).method.dpo
    assert own.losses == (("sigmoid", 0.5), ("sft", 2.0)) and own.pair_losses == (("sigmoid", 0.5),)
    assert own.nll_weight == 2.0


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
