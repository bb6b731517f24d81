"""What a run's settings of routers and of the expert axis come to, and what is refused before any weight is read."""

import json

import pytest

from jaxft import models
from jaxft.assets import ASSETS
from jaxft.config import resolve
from jaxft.errors import ConfigError
from jaxft.methods.parts.router import router_coefficients
from jaxft.objectives.router import RouterCoefficients
from jaxft.runs.build import check_experts
from jaxft.sharding.mesh import make_mesh_plan

PUBLISHED = ASSETS / "published"


def model(name):
    return models.abstract_model(
        models.config_from_hf(json.loads((PUBLISHED / f"{name}.json").read_text(encoding="utf-8")))
    )


def config(adapter="none", mesh=None, **router):
    return resolve(
        {
            "model": {"path": "m"}, "data": {"train": "t.jsonl"}, "adapter": {"kind": adapter}, "router": router,
            "mesh": mesh or {},
        }
    )  # fmt: skip


MIXTRAL, SMOL = model("mixtral-8x7b"), model("smollm2-135m")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, RouterCoefficients(load_balancing=0.02)),
        ({"z_loss": 0.001}, RouterCoefficients(load_balancing=0.02, z_loss=0.001)),
        ({"load_balancing": 0.0}, None),
        ({"adapter": "lora"}, None),
        ({"adapter": "lora", "load_balancing": 0.01}, RouterCoefficients(load_balancing=0.01)),
    ],
)
def test_coefficients(given, expected):
    assert router_coefficients(config(**given), MIXTRAL) == expected


def test_a_model_without_experts_has_no_such_losses():
    assert router_coefficients(config(), SMOL) is None
    with pytest.raises(ConfigError, match=r"router\.load_balancing=0\.01 .* which this model does not have"):
        router_coefficients(config(load_balancing=0.01), SMOL)
    with pytest.raises(ConfigError, match=r"router\.z_loss=0\.1 are losses"):
        router_coefficients(config(z_loss=0.1), SMOL)


@pytest.mark.parametrize("name", ["load_balancing", "z_loss"])
def test_negative_coefficients_are_refused(name):
    with pytest.raises(ConfigError, match=rf"router\.{name}=-0\.1 must be zero or more"):
        config(**{name: -0.1})


def test_the_expert_axis_must_fit_the_model():
    plan = make_mesh_plan(config(mesh={"expert": 4}).mesh)
    check_experts(MIXTRAL, plan)
    check_experts(SMOL, make_mesh_plan(config().mesh))
    with pytest.raises(ConfigError, match=r"mesh\.expert=4, but the model has no experts: use mesh\.fsdp"):
        check_experts(SMOL, plan)
    six = models.abstract_model(
        models.config_from_hf(MIXTRAL.config.to_hf() | {"num_local_experts": 6, "num_hidden_layers": 1})
    )
    with pytest.raises(ConfigError, match=r"mesh\.expert=4 does not divide the model's 6 experts.*1, 2, 3, 6"):
        check_experts(six, plan)
