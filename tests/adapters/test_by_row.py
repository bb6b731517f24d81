"""LoRA by row: every row of a batch gets what its own adapter gives alone, and what is no plain LoRA is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft import models
from jaxft.adapters.attach import adapters, slots
from jaxft.adapters.by_row import RowLoRA, attach_rows, halves_of, write_halves
from jaxft.adapters.make import attach_adapter
from jaxft.adapters.named import take
from jaxft.config import AdapterConfig, MeshConfig
from jaxft.errors import ConfigError, ModelError
from jaxft.nn.adapter import RowNumbers
from jaxft.nn.storage import storage_dims_of
from jaxft.sharding.mesh import make_mesh_plan

TOKENS = np.random.default_rng(0).integers(0, 250, (8, 12))
FORMS = [
    {"r": 8, "alpha": 16.0},
    {"r": 4, "use_rslora": True, "layers_to_transform": "1", "rank_pattern": "q_proj:8,down_proj:2"},
    {"r": 4, "alpha": 3.0, "init_lora_weights": "pissa", "target_modules": "q_proj,down_proj"},
]
ROWS = np.array([1, 0, 3, 2, 2, 3, 0, 1], np.int32)


def logits_of(module, rows=None, plan=None):
    graphdef, state = nnx.split(module)

    def run(state, tokens, rows):
        module = nnx.merge(graphdef, state)
        if rows is not None:
            module.shared = RowNumbers(rows)
        return module.unembed(module(tokens)[0])

    run = jax.jit(run if plan is None else plan.bind(run))
    return np.asarray(run(state, jnp.asarray(TOKENS), rows))


def adapted(base, form):
    """The base with an adapter as if trained."""
    module = nnx.merge(*nnx.split(base))
    attach_adapter(module, AdapterConfig(**form), 0)
    for number, lora in enumerate(adapters(module).values()):
        a, b = np.asarray(lora.lora_a.get_value()), np.asarray(lora.lora_b.get_value())
        noise = 0.1 * np.random.default_rng(number).standard_normal(b.shape, np.float32)
        lora.lora_b.set_value(jnp.asarray(b + noise * (a != 0).any(axis=-1, keepdims=True)))
    return module


@pytest.fixture(scope="module")
def base(smoke_config):
    return models.random_model(models.config_from_hf(smoke_config), seed=0)


@pytest.fixture(scope="module")
def tuned(base):
    return [adapted(base, form) for form in FORMS]


@pytest.fixture(scope="module")
def by_row(base, tuned):
    module = nnx.merge(*nnx.split(base))
    attach_rows(module, count=len(FORMS), max_rank=8)
    for number, one in enumerate(tuned, 1):
        write_halves(module, number, halves_of(take(nnx.merge(*nnx.split(one)))))
    return module


@pytest.fixture(scope="module")
def together(by_row):
    return logits_of(by_row, ROWS)


def test_each_row_is_as_with_its_adapter_alone(base, tuned, together):
    alone = [logits_of(one) for one in (base, *tuned)]
    for row, number in enumerate(ROWS):
        np.testing.assert_allclose(together[row], alone[number][row], rtol=0, atol=2e-5)
        assert number == 0 or np.abs(alone[number][row] - alone[0][row]).max() > 0.02
    # Every form of adapter moves the logits otherwise.
    assert all(np.abs(one[0] - other[0]).max() > 0.02 for i, one in enumerate(alone) for other in alone[:i])


def test_a_number_is_written_anew_in_place(by_row, tuned, together):
    halves = [halves_of(take(nnx.merge(*nnx.split(tuned[number])))) for number in (0, 1)]
    write_halves(by_row, 2, halves[0])  # on other layers and of a higher rank
    changed = logits_of(by_row, ROWS)
    np.testing.assert_array_equal(changed[[0, 1, 2, 5, 6, 7]], together[[0, 1, 2, 5, 6, 7]])
    np.testing.assert_allclose(logits_of(by_row, np.full(8, 2, np.int32)), logits_of(tuned[0]), rtol=0, atol=2e-5)
    write_halves(by_row, 2, halves[1])
    np.testing.assert_array_equal(logits_of(by_row, ROWS), together)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_eight_devices_equal_one(by_row, together):
    plan = make_mesh_plan(MeshConfig(data=4, tensor=2))
    graphdef, params = nnx.split(by_row)
    split = nnx.merge(graphdef, plan.shard(params, storage_dims_of(by_row)))
    np.testing.assert_allclose(logits_of(split, ROWS, plan), together, rtol=0, atol=1e-5)
    write_halves(split, 1, {path: (a[..., :1, :], b[..., :1, :]) for path, (a, b) in _halves(split).items()})
    halves = [param for adapter in adapters(split).values() for param in (adapter.a, adapter.b)]
    assert len(halves[0].get_value().sharding.device_set) == 8


def _halves(module):
    return {path: (one.a.get_value()[:, 1], one.b.get_value()[:, 1]) for path, one in adapters(module).items()}


def test_halves_are_in_the_type_of_computation(smoke_config):
    module = models.random_model(models.config_from_hf(smoke_config), seed=0, dtype="bfloat16")
    paths = attach_rows(module, count=1, max_rank=4, targets=("q_proj", "down_proj"))
    attached = adapters(module)
    assert set(paths) == set(attached) and all(type(one) is RowLoRA for one in attached.values())
    assert {path.rpartition("/")[2] for path in paths} == {"q_proj", "down_proj"}
    assert {one.a.get_value().dtype.name for one in attached.values()} == {"bfloat16"}
    assert all(one.a.get_value().shape[1:3] == (2, 4) for one in attached.values())


OTHERS = {
    "DoRA on layers/0/self_attn/q_proj": {"use_dora": True, "target_modules": "q_proj"},
    "LoRA of the embeddings on embed_tokens": {"target_modules": "embed_tokens"},
    "IA3 on layers/0": {"kind": "ia3"},
    "virtual tokens": {"kind": "prefix", "num_virtual_tokens": 2},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_are_refused_by_name(smoke_config, kind):
    module = models.random_model(models.config_from_hf(smoke_config | {"tie_word_embeddings": False}), seed=0)
    attach_adapter(module, AdapterConfig(**OTHERS[kind]), 0)
    with pytest.raises(ModelError, match=f"the adapter is {kind}.*; by row, adapters are plain LoRA"):
        halves_of(take(module))


def test_what_has_no_room_is_refused(base, by_row, tuned):
    halves = halves_of(take(nnx.merge(*nnx.split(tuned[0]))))
    narrow = nnx.merge(*nnx.split(base))
    attach_rows(narrow, count=1, max_rank=4, targets=("q_proj",))
    with pytest.raises(ModelError, match="the adapter is on layers/0/.*; by row, adapters are on linear layers"):
        write_halves(narrow, 1, halves)
    with pytest.raises(ModelError, match="rank 8 on layers/0/self_attn/q_proj, and there is room for rank 4"):
        write_halves(narrow, 1, {path: both for path, both in halves.items() if path.endswith("q_proj")})
    with pytest.raises(ModelError, match="the adapter is on no layer"):
        write_halves(narrow, 1, {})
    with pytest.raises(ModelError, match="the model has an adapter already"):
        attach_rows(narrow, count=1, max_rank=4)
    with pytest.raises(ConfigError, match="room for 0 adapters of rank 4"):
        attach_rows(narrow, count=0, max_rank=4)
    with pytest.raises(ModelError, match="need the number of each row's adapter"):
        logits_of(by_row)
    layer = dict(slots(by_row))["layers/0/self_attn/q_proj"].adapter
    layer.shared = np.zeros(3, np.int32)
    with pytest.raises(ModelError, match=r"inputs of shape \(12, 3\), which are not 3 rows"):
        layer(jnp.zeros((12, 3)), jnp.zeros((12, 3)), None, None)
    layer.shared = nnx.data(None)
