"""Tables of other rooms name exactly the choices of the config, and options of the command line read them."""

import jax
import pytest
from config_files import with_fields
from flax import nnx

from jaxft import cli
from jaxft.assets import ASSETS
from jaxft.config import (
    CheckpointConfig,
    DataConfig,
    MethodConfig,
    ModelConfig,
    RunConfig,
    choices,
    resolve,
)
from jaxft.config.mesh import MeshConfig
from jaxft.config.train import METRICS
from jaxft.data.formats import READERS
from jaxft.evaluation import metrics
from jaxft.hardware import analytic
from jaxft.hardware.recomputation import POLICIES
from jaxft.hardware.sizes import sizes_of
from jaxft.methods import method_of
from jaxft.methods.sft import with_perplexity
from jaxft.nn.stack import REMAT
from jaxft.objectives.loss import with_batch_sums
from jaxft.quant import FORMATS
from jaxft.runs.build import abstract_model
from jaxft.sharding.mesh import make_mesh_plan


def test_tables_name_the_choices_of_the_config():
    assert {"none", *REMAT} == set(POLICIES) == set(choices(ModelConfig, "remat")) - {"auto"}
    assert tuple(FORMATS) == choices(ModelConfig, "quantization")
    assert {"auto", *READERS} == set(choices(DataConfig, "format"))
    assert tuple(metrics.METRICS) == METRICS
    assert set(analytic.BYTES) == set(choices(ModelConfig, "dtype"))
    assert set(make_mesh_plan(MeshConfig()).axes) == set(vars(MeshConfig())) - {"auto"}


def test_estimates_know_every_choice_of_recomputation_and_of_types():
    path = {"model.path": str(ASSETS / "smoke"), "model.random_init": True}
    sizes = sizes_of(abstract_model(resolve(with_fields(path))))
    kept = {}
    for remat in POLICIES:
        for quantization in (None, *choices(ModelConfig, "quantization")):
            for dtype in choices(ModelConfig, "dtype"):
                model = {"model.remat": remat, "model.quantization": quantization, "model.dtype": dtype}
                config = resolve(with_fields(path | model))
                cut = analytic.cut_of(config, {"fsdp": 2}, kernel=True)
                kept[remat, dtype] = analytic.memory_of(config, sizes, cut, 0).temporaries
                assert analytic.costs_of(config, sizes, cut, 0, 10**9).flops > 0
    for dtype in choices(ModelConfig, "dtype"):
        assert kept["full", dtype] < kept["attention", dtype] < kept["none", dtype]


@pytest.mark.parametrize("name", choices(MethodConfig, "name"))
def test_a_method_reports_the_metrics_that_its_section_names(name):
    fields = {"model.path": str(ASSETS / "smoke"), "model.random_init": True, "method.name": name}
    if name == "distill":
        fields |= {"method.distill.teacher": str(ASSETS / "smoke"), "method.distill.cache_top_k": 4}
    config = resolve(with_fields(fields))
    model, method = abstract_model(config), method_of(config)
    graphdef, arrays = nnx.split(model)
    loss, batch = method.loss(config, model), method.batch_shapes(config)
    sums_of = method.batch_sums(config, model)

    def of_batch(arrays, batch):
        module = nnx.merge(graphdef, arrays)
        whole = None if sums_of is None else sums_of(module, batch, None)
        return loss(module, batch, None, with_batch_sums(None, whole))

    sums = jax.eval_shape(of_batch, arrays, batch)
    reported = {"eval_loss", *(f"eval_{metric}" for metric in sums.metrics)}
    if name == "sft":
        reported |= with_perplexity({"eval_loss": 1.0}).keys()
    if config.method.chosen.ROWS == "prompts":  # measured by answers, which tests of whole runs read
        reported |= {"eval_reward"}
    assert set(config.method.chosen.HELD_OUT_METRICS) <= reported
    assert set(config.method.chosen.HELD_OUT_METRICS) <= set(choices(CheckpointConfig, "best_metric"))


def test_every_metric_that_may_be_the_best_is_reported_by_a_method():
    methods = [getattr(RunConfig().method, name) for name in choices(MethodConfig, "name")]
    reported = {metric for method in methods for metric in method.HELD_OUT_METRICS}
    assert reported == set(choices(CheckpointConfig, "best_metric"))


def test_options_of_the_command_line_take_the_choices_of_the_config():
    verbs = next(action.choices for action in cli.make_parser()._actions if isinstance(action.choices, dict))
    options = {
        (verb, name): tuple(action.choices)
        for verb, parser in verbs.items()
        for name, action in parser._option_string_actions.items()
        if action.choices
    }
    for (verb, name), values in options.items():
        if name in ("--dtype", "--quantization") and verb != "convert":
            assert values == choices(ModelConfig, name.removeprefix("--")), f"{verb} {name}"
    assert {"--dtype", "--quantization"} <= {name for _, name in options}
