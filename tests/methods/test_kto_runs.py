"""KTO as a whole run: it learns, resumes bit for bit, is the same on 8 devices, and is planned."""

from functools import partial

import pair_runs
import pytest
from pair_runs import (
    KINDS,
    LABELLED,
    SGD,
    assert_eight_devices_equal_one,
    evaluate_export,
    train_lose_the_end_and_resume,
    write_rows,
)

from jaxft.errors import ConfigError
from jaxft.hardware.topology import parse
from jaxft.methods import kto
from jaxft.planning.job import abstract_step_of, sharded_step_of
from jaxft.planning.shapes import shapes_of
from jaxft.runs.build import abstract_model

config_of = partial(pair_runs.config_of, "kto")
APO = {"method.kto.loss_type": "apo_zero_unpaired"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("labelled"), LABELLED)


@pytest.mark.parametrize("kind", ["lora", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("full", "qlora"))])
def test_a_run_learns_and_resumes_bit_for_bit(rows, tmp_path, kind):
    config = config_of(rows, tmp_path / "run", **KINDS[kind])
    (first, *_, last), summary = train_lose_the_end_and_resume(config, tmp_path / "run")
    assert first["loss"] == pytest.approx(0.5, abs=1e-5) and first["kl"] == pytest.approx(0, abs=1e-4)
    assert last["loss"] < 0.47 and last["rewards/margins"] > 0.1 and last["kl"] >= 0
    assert last["count/chosen"] + last["count/rejected"] > 8
    assert last["rewards/chosen"] > last["rewards/rejected"] and last["logps/chosen"] < 0
    assert summary["eval_rewards/margins"] > 0.05 and summary["eval_count/chosen"] == 2
    # jaxft eval finds the same reference and the same mismatched documents.
    evaluated = evaluate_export(config)
    for name in ("eval_loss", "eval_rewards/margins", "eval_kl"):
        assert evaluated[name] == pytest.approx(summary[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("lora", {}), ("full", APO), pytest.param("qlora", {}, marks=pytest.mark.slow)],
    ids=["kto", "apo", "kto-qlora"],
)
def test_eight_devices_equal_one(rows, tmp_path, kind, fields):
    config = config_of(rows, tmp_path / "run", **KINDS[kind] | SGD | fields)
    metrics = assert_eight_devices_equal_one(config, tmp_path)
    assert abs(metrics["rewards/margins"]) > 1e-4 and ("kl" in metrics) == (not fields)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"adapter.kind": "prompt"}, r"adapter.kind='prompt' puts virtual tokens into every row"),
        ({"adapter.modules_to_save": "norm"}, r"method.name='kto' .*Or set method.kto.reference='cached'"),
        ({"adapter.dropout": 0.1}, r"adapter.dropout=0.1 would change"),
        ({"data.truncation": "right"}, r"data.truncation='right' would cut answers, whose label is of the whole"),
        ({"data.train_on": "all"}, r"data.train_on='all' trains prompts too, which nobody labelled"),
    ],
)
def test_settings_that_it_cannot_train_with_are_refused(rows, tmp_path, overrides, message):
    config = config_of(rows, tmp_path / "run", **overrides)
    with pytest.raises(ConfigError, match=message):
        kto.check(config, abstract_model(config))


def test_plans_count_the_passes_without_a_gradient(rows, tmp_path):
    """Both models through mismatched documents, and the reference through answers, if nothing is cached."""
    flops, passes = {}, {}
    cases = {"kto": {}, "apo": APO, "cached": {"method.kto.reference": "cached"}}
    cases["cached apo"] = cases["cached"] | APO
    for name, changes in cases.items():
        config = config_of(rows, tmp_path, **changes)
        step = sharded_step_of(abstract_step_of(config, shapes_of(config)[0], 6), config, parse("h100:1", 1))
        flops[name], passes[name] = step.model_flops, len(step.references)
    assert passes == {"kto": 3, "apo": 1, "cached": 1, "cached apo": 0}
    assert flops["kto"] - flops["apo"] == pytest.approx(2 * (flops["cached"] - flops["cached apo"]), rel=1e-6)
