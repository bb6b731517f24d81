"""Every kind of adapter that a config may name is a module that puts it into a model, and the other way round."""

import pkgutil

import pytest

from jaxft import adapters as room
from jaxft import models
from jaxft.adapters.attach import AdapterParam, adapters, detach, virtual
from jaxft.adapters.make import attach_adapter
from jaxft.config import AdapterConfig, choices

ADAPTERS = choices(AdapterConfig, "kind")


def kinds():
    for found in pkgutil.iter_modules(room.__path__):
        module = __import__(f"{room.__name__}.{found.name}", fromlist=["put"])
        if hasattr(module, "put"):
            yield found.name


def test_a_config_may_name_every_kind_and_no_other():
    assert {"none", *kinds()} == set(ADAPTERS)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_kind_puts_what_moves_into_a_model(smoke_config, kind):
    from flax import nnx

    from jaxft.trees import flatten

    module = models.random_model(models.config_from_hf(smoke_config), seed=0)
    before = set(flatten(nnx.state(module))[0])
    attach_adapter(module, AdapterConfig(kind=kind, r=2), 0)
    added = set(flatten(nnx.state(module))[0]) - before
    assert bool(added) == (kind != "none")
    assert bool(flatten(nnx.state(module, AdapterParam))[0]) == (kind != "none")
    slots = {"adapter", "prompt", "prefix", "shared"}
    assert all(slots & set(path.split("/")) for path in added)
    assert bool(adapters(module)) == (kind in ("lora", "vera", "ia3"))
    assert bool(virtual(module)) == (kind in ("prompt", "prefix"))
    detach(module)
    assert set(flatten(nnx.state(module))[0]) == before
