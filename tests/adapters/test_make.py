"""Every kind of adapter that a config may name is a module that puts it into a model, and the other way round."""

import pkgutil
import sys
from types import ModuleType, SimpleNamespace

import pytest

from jaxft import adapters as room
from jaxft import models
from jaxft.adapters.attach import AdapterParam, adapters, detach, virtual_modules
from jaxft.adapters.make import attach_adapter, describe
from jaxft.config import AdapterConfig, choices

ADAPTERS = choices(AdapterConfig, "kind")


def kinds():
    for found in pkgutil.iter_modules(room.__path__):
        module = __import__(f"{room.__name__}.{found.name}", fromlist=["attach_to"])
        if hasattr(module, "attach_to"):
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
    virtual = AdapterConfig(kind=kind).virtual_tokens > 0
    assert bool(virtual_modules(module)) == virtual
    assert bool(adapters(module)) == (kind != "none" and not virtual)
    detach(module)
    assert set(flatten(nnx.state(module))[0]) == before


@pytest.mark.parametrize(
    ("config", "phrase"),
    [
        (AdapterConfig(kind="none"), "no adapter"),
        (AdapterConfig(r=8), "LoRA r=8 on all-linear"),
        (AdapterConfig(use_dora=True, target_modules="q_proj,v_proj"), "DoRA r=16 on q_proj,v_proj"),
        (AdapterConfig(r=8, dropout=0.05), "LoRA r=8 on all-linear, dropout 13/256"),
        (AdapterConfig(kind="vera", r=256), "VeRA r=256 on all-linear"),
        (AdapterConfig(kind="ia3", target_modules="k_proj,v_proj"), "IA3 on k_proj,v_proj"),
        (AdapterConfig(kind="prompt", num_virtual_tokens=3), "a prompt of 3 virtual tokens"),
        (AdapterConfig(kind="prefix"), "a prefix of 20 virtual tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_kind_describes_itself(config, phrase):
    assert describe(config) == phrase


def test_a_new_kind_needs_only_its_module(monkeypatch):
    attached = []
    module = ModuleType("jaxft.adapters.offset")
    module.attach_to = lambda model, config, key: attached.append(config.kind)
    module.describe = lambda config: f"an offset on {config.target_modules}"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    config = AdapterConfig(kind="offset")
    assert describe(config) == "an offset on all-linear"
    attach_adapter(SimpleNamespace(value=None), config, 0)
    assert attached == ["offset"]


def test_every_kind_has_a_description():
    assert all(describe(AdapterConfig(kind=kind)) for kind in ADAPTERS)
