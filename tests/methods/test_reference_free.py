"""ORPO, CPO and SimPO as whole runs: they learn, resume bit for bit, and are the same on 8 devices."""

import pytest
from pair_runs import (
    KINDS,
    SGD,
    assert_eight_devices_equal_one,
    config_of,
    evaluate_export,
    train_lose_the_end_and_resume,
    write_rows,
)

from jaxft.errors import ConfigError
from jaxft.methods import method_of
from jaxft.runs.build import abstract_model

METHODS = ("orpo", "cpo", "simpo")
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("pairs"))


@slow
@pytest.mark.parametrize(
    ("method", "kind"),
    [
        *(("orpo", "lora"), ("orpo", "full"), ("cpo", "lora"), ("simpo", "full")),
        *((method, "qlora") for method in METHODS),
    ],
)
def test_a_run_learns_and_resumes_bit_for_bit(rows, tmp_path, method, kind):
    config = config_of(method, rows, tmp_path / "run", **KINDS[kind])
    (first, *_, last), summary = train_lose_the_end_and_resume(config, tmp_path / "run")
    assert last["loss"] < first["loss"] and last["rewards/margins"] > first["rewards/margins"]
    assert summary["eval_rewards/accuracies"] > 0.5
    assert set(config.method.chosen.HELD_OUT_METRICS) <= set(summary)
    if kind == "qlora":
        evaluated = evaluate_export(config)
        for name in config.method.chosen.HELD_OUT_METRICS:
            assert evaluated[name] == pytest.approx(summary[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(
    ("method", "kind"), [("orpo", "full"), ("simpo", "lora"), pytest.param("cpo", "full", marks=slow)]
)
def test_eight_devices_equal_one(rows, tmp_path, method, kind):
    more = {"method.orpo.nll_on_prompt": True} if method == "orpo" else {}
    axes = ("fsdp", "context", "tensor") if method == "orpo" else ("data", "fsdp", "tensor")
    config = config_of(method, rows, tmp_path / "run", **KINDS[kind] | SGD | more)
    assert float(assert_eight_devices_equal_one(config, tmp_path, axes)["loss"]) > 0


@pytest.mark.parametrize("method", METHODS)
def test_rows_and_settings_that_they_cannot_train_with_are_refused(rows, tmp_path, method):
    config = config_of(method, rows, tmp_path / "run", **{"data.truncation": "right"})
    with pytest.raises(ConfigError, match=r"data.truncation='right' would cut the rejected answer"):
        method_of(config).check(config, abstract_model(config))
    config = config_of(method, rows, tmp_path / "run", **{"data.format": "messages"})
    with pytest.raises(ConfigError, match=rf"data.format='messages' .* method.name='{method}' reads rows of prompt"):
        method_of(config).check(config, abstract_model(config))
    config = config_of(method, rows, tmp_path / "run", **{"router.z_loss": 0.1})
    with pytest.raises(ConfigError, match=r"router.z_loss=0.1 are losses on the routers of experts"):
        method_of(config).check(config, abstract_model(config))


def test_label_smoothing_that_no_loss_reads_is_refused(rows, tmp_path):
    fields = {"method.cpo.loss_type": "hinge", "method.cpo.label_smoothing": 0.1}
    with pytest.raises(ConfigError, match=r"cpo.label_smoothing=0.1 is read only if method.cpo.loss_type is 'sigmoid'"):
        config_of("cpo", rows, tmp_path, **fields)


def test_without_a_reference_dropout_and_virtual_tokens_are_no_obstacle(rows, tmp_path):
    for changes in ({"adapter.dropout": 0.1}, {"adapter.kind": "prompt"}, {"adapter.modules_to_save": "norm"}):
        config = config_of("simpo", rows, tmp_path / "run", **changes)
        method_of(config).check(config, abstract_model(config))


def test_what_a_run_says_of_its_method(rows, tmp_path):
    words = {method: method_of(config := config_of(method, rows, tmp_path)).describe(config) for method in METHODS}
    assert words == {
        "orpo": "ORPO with beta=0.1", "cpo": "CPO with beta=0.1", "simpo": "SimPO with beta=2 and gamma=0.5",
    }  # fmt: skip
