"""Several adapters on one base: switched, together, combined as PEFT does it, one trained beside others."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxft.adapters.attach import AdapterParam, adapters, merge
from jaxft.adapters.combine import combine
from jaxft.adapters.ia3 import attach_ia3
from jaxft.adapters.lora import LoRA
from jaxft.adapters.named import AdapterSet, take
from jaxft.adapters.prompt import attach_prompt
from jaxft.adapters.vera import VeRASettings, attach_vera
from jaxft.checkpoint.load import load_model
from jaxft.checkpoint.named_adapters import load_adapters, write_named
from jaxft.errors import ConfigError, ModelError
from jaxft.training.state import divide
from jaxft.trees import flatten

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 12))
LORAS = {
    "a": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "b": {"r": 4, "lora_alpha": 2, "target_modules": ["v_proj", "down_proj", "o_proj"], "use_rslora": True},
    "wide": {"r": 6, "lora_alpha": 6, "target_modules": ["v_proj", "up_proj"]},
}


@pytest.fixture(scope="module")
def theirs(tiny_llama, torch_llama, tmp_path_factory):
    """(PEFT's model with all of LORAS, their folders by name, the base)."""
    torch.manual_seed(0)
    base, root, model = tiny_llama("plain"), tmp_path_factory.mktemp("named"), None
    for name, settings in LORAS.items():
        config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
        if model is None:
            model = peft.get_peft_model(torch_llama(base), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    model.save_pretrained(root)
    return model.eval(), {name: str(root / name) for name in LORAS}, base


@pytest.fixture
def held(theirs):
    _, folders, base = theirs
    loaded = load_model(base)
    return loaded, load_adapters(loaded, folders)


def logits(loaded):
    # LoadedModel compiles for one set of adapters.
    return type(loaded)(loaded.module, loaded.hf_config, loaded.base).logits(TOKENS)


def torch_logits(model, *names):
    model.base_model.set_adapter(list(names))
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def test_on_a_quantised_base_each_is_as_if_it_were_loaded_alone(theirs):
    _, folders, base = theirs
    loaded = load_model(base, quantization="int8")
    named = load_adapters(loaded, folders)
    untouched = logits(loaded)
    np.testing.assert_array_equal(untouched, load_model(base, quantization="int8").logits(TOKENS))
    for name in folders:
        named.activate(name)
        alone = load_model(folders[name], quantization="int8").logits(TOKENS)
        np.testing.assert_array_equal(logits(loaded), alone)
        assert np.abs(alone - untouched).max() > 1e-3


def test_each_alone_and_several_together_as_in_peft(theirs, held):
    reference, folders, base = theirs
    loaded, named = held
    untouched = load_model(base).logits(TOKENS)
    assert (named.names, named.active) == (("a", "b", "wide"), ())
    np.testing.assert_array_equal(logits(loaded), untouched)
    for active in (("a",), ("b",), ("a", "b", "wide"), ("wide",)):
        named.activate(*active)
        np.testing.assert_allclose(logits(loaded), torch_logits(reference, *active), rtol=0, atol=2e-5)
    # One alone is as if it were the only one.
    alone = load_model(folders["wide"])
    assert nnx.split(loaded.module)[0] == nnx.split(alone.module)[0]
    np.testing.assert_array_equal(logits(loaded), alone.logits(TOKENS))
    named.activate("a", "b")
    named.drop("a")
    assert (named.names, named.active) == (("b", "wide"), ("b",))
    named.activate()
    np.testing.assert_array_equal(logits(loaded), untouched)


def test_together_they_merge(held):
    loaded, named = held
    named.activate("a", "b")
    before = logits(loaded)
    merge(loaded.module)
    np.testing.assert_allclose(logits(loaded), before, rtol=0, atol=2e-5)


WEIGHTED = [
    ("linear", {"a": 0.7, "b": -0.4}, {}),
    ("cat", {"a": 0.7, "b": -0.4, "wide": 1.5}, {}),
    ("svd", {"a": 0.7, "b": 0.4, "wide": 1.0}, {"svd_rank": 3}),
    ("ties", {"a": 0.7, "b": 0.4}, {"density": 0.5}),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("way", "weights", "settings"), WEIGHTED, ids=[w[0] for w in WEIGHTED])
def test_combinations_are_those_of_peft(theirs, held, tmp_path, way, weights, settings):
    reference, _, _ = theirs
    loaded, named = held
    reference.add_weighted_adapter(list(weights), list(weights.values()), way, combination_type=way, **settings)
    expected = torch_logits(reference, way)
    reference.delete_adapter(way)
    combine(named, "new", weights, way=way, rank=settings.get("svd_rank"), density=settings.get("density"))
    named.activate("new")
    np.testing.assert_allclose(logits(loaded), expected, rtol=0, atol=5e-5)
    assert np.abs(expected - torch_logits(reference, "a")).max() > 0.01
    named.activate("a")
    write_named(named, "new", str(tmp_path / "new"), model=loaded)
    assert named.active == ("a",)
    np.testing.assert_allclose(load_model(str(tmp_path / "new")).logits(TOKENS), expected, rtol=0, atol=5e-5)


def gradient(module):
    graphdef, trainable, frozen = divide(module)

    def total(trainable):
        module = nnx.merge(graphdef, trainable, frozen)
        return (module.unembed(module(TOKENS)[0]) ** 2).sum()

    return jax.jit(jax.grad(total))(trainable)


def test_one_is_trained_while_others_stand_still(held, theirs):
    loaded, named = held
    named.activate("a", "b", train="b")
    grads = gradient(loaded.module)
    sizes = {path: adapter for path, adapter in named["b"].layers.items()}
    assert sum(g.size for g in jax.tree.leaves(grads)) == sum(
        part.lora_a.get_value().size + part.lora_b.get_value().size for part in sizes.values()
    )
    # As if the other one were in the base.
    other = load_model(theirs[1]["a"])
    merge(other.module)
    lone = load_adapters(other, {"b": theirs[1]["b"]})
    lone.activate("b")
    expected = gradient(other.module)
    for ours, alone in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, alone, rtol=1e-4, atol=1e-4 * float(np.abs(alone).max()))
    # What an optimizer moves is moved in the named adapter, and the other one is as it was.
    before = {path: np.asarray(part.lora_a.get_value()) for path, part in named["a"].layers.items()}
    nnx.update(loaded.module, jax.tree.map(lambda x: x + 1.0, divide(loaded.module)[1]))
    named.activate("a")
    assert all(np.array_equal(before[path], part.lora_a.get_value()) for path, part in named["a"].layers.items())
    assert jax.tree.leaves(nnx.state(loaded.module, AdapterParam))
    named.activate("b")
    moved, was = (flatten(nnx.state(m, AdapterParam))[0] for m in (loaded.module, other.module))
    assert all(np.allclose(moved[path], was[path] + 1.0) for path in was)


def test_other_kinds_side_by_side(tiny_llama):
    loaded = load_model(tiny_llama("plain"))
    named = AdapterSet(loaded.module)
    for name, put in {
        "vera": lambda m: attach_vera(m, ("q_proj",), VeRASettings(r=4)),
        "vera too": lambda m: attach_vera(m, ("q_proj",), VeRASettings(r=4)),
        "other vera": lambda m: attach_vera(m, ("q_proj",), VeRASettings(r=4, seed=1)),
        "ia3": lambda m: attach_ia3(m, ("q_proj", "down_proj"), ("down_proj",)),
        "prompt": lambda m: attach_prompt(m, np.arange(3)),
        "other prompt": lambda m: attach_prompt(m, np.arange(2)),
    }.items():
        put(loaded.module)
        named.add(name, take(loaded.module))
    for path in named["vera"].layers:
        named["vera"].layers[path].lambda_b.set_value(0.1 + named["vera"].layers[path].lambda_b.get_value())
    for part in named["ia3"].layers.values():
        part.factors.set_value(1.5 * part.factors.get_value())
    named.activate("prompt", "vera", "vera too", "ia3")
    together = logits(loaded)
    assert loaded.module.virtual_tokens == 3 and len(adapters(loaded.module)) == 2
    named.activate("prompt", "ia3")
    assert np.abs(together - logits(loaded)).max() > 1e-3
    with pytest.raises(ModelError, match="'prompt' and 'other prompt' both put virtual tokens first"):
        named.activate("prompt", "other prompt")
    with pytest.raises(ModelError, match="'vera' and 'other vera' share other random matrices"):
        named.activate("vera", "other vera")
    with pytest.raises(ModelError, match="'ia3' is not plain LoRA of one rank"):
        combine(named, "new", {"ia3": 1.0})


def test_what_cannot_be_is_refused(held, monkeypatch):
    loaded, named = held
    with pytest.raises(ModelError, match="no adapter 'c'. There are: a, b, wide"):
        named.activate("c")
    with pytest.raises(ModelError, match="Did you mean 'wide'"):
        combine(named, "new", {"wied": 1.0})
    with pytest.raises(ModelError, match="there is an adapter 'a' already"):
        combine(named, "a", {"b": 1.0})
    with pytest.raises(ModelError, match="train='b' is not among the active adapters a"):
        named.activate("a", train="b")
    with pytest.raises(ModelError, match=r"mixes halves of one rank, these differ \(a 4, wide 6\)"):
        combine(named, "new", {"a": 1.0, "wide": 1.0}, way="linear")
    with pytest.raises(ConfigError, match="way='tise' is not one of .*Did you mean 'ties'"):
        combine(named, "new", {"a": 1.0}, way="tise")
    for settings in ({"way": "ties"}, {"way": "ties", "density": 1.5}, {"density": 0.5}):
        with pytest.raises(ConfigError, match="is the share of numbers that way='ties' keeps"):
            combine(named, "new", {"a": 1.0, "b": 1.0}, **settings)
    for weights, rank in (({}, None), ({"a": 1.0}, 3)):
        with pytest.raises(ConfigError, match="at least one adapter with its weight, and a rank"):
            combine(named, "new", weights, rank=rank)
    named.activate("a")
    with pytest.raises(ModelError, match="has an adapter without a name"):
        AdapterSet(loaded.module)
    monkeypatch.setattr(LoRA, "stacks", False)
    with pytest.raises(ModelError, match="'a' is of a kind that must be alone in its layers"):
        named.activate("a", "b")
