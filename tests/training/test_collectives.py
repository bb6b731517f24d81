"""What travels between the chips of a slice in one step, read from the compiled program: what is meant to, no more."""

import collections
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft import config, models
from jaxft.config import AdapterConfig, MeshConfig, OptimConfig
from jaxft.data.batch import Batch
from jaxft.hardware import analytic
from jaxft.hardware.compile import ENVIRONMENT, compile_step
from jaxft.hardware.costs import costs_of
from jaxft.hardware.hlo import parse
from jaxft.hardware.sizes import sizes_of
from jaxft.nn.storage import storage_dims_of
from jaxft.objectives.sft import sft_loss
from jaxft.optim.make import make_optimizer, make_schedule
from jaxft.runs.build import attach_adapter
from jaxft.sharding.mesh import make_mesh_plan
from jaxft.training.state import create
from jaxft.training.step import make_train_step

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiles for TPU with libtpu")

# Weights of a layer, its tokens on one chip and its whole batch are of very different sizes.
SIZES = {
    "model_type": "llama", "vocab_size": 2048, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 128,
}  # fmt: skip
EXPERTS = SIZES | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
ROWS, LENGTH = 8, 128
LAYER = 4 * 512 * 512 + 3 * 512 * 1024  # elements of a layer's matrices


# Bytes of bfloat16.
WEIGHTS = 3 * LAYER * 2
TOKENS = ROWS * LENGTH * 512 * 2
ADAPTERS = 3 * 8 * (4 * 1024 + 3 * 1536) * 2


@pytest.fixture
def transfers(monkeypatch):
    """transfers(kind, gradient, **axes): bytes that a chip receives in a step, by (kind of exchange, axes)."""
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    return received


def received(kind, gradient="bfloat16", family=SIZES, length=LENGTH, **axes):
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    plan = make_mesh_plan(MeshConfig(**axes), devices)
    optim = OptimConfig(schedule="constant")
    schedule = make_schedule(optim, 10)
    tx, made = make_optimizer(optim, schedule), {}

    def start():
        types = {"dtype": "bfloat16", "param_dtype": "float32" if kind == "none" else "bfloat16", "remat": "full"}
        module = models.random_model(models.config_from_hf(family), seed=0, **types)
        attach_adapter(module, AdapterConfig(kind=kind, r=8), 0)
        made["graphdef"], state = create(module, tx, 0)
        made["dims"] = storage_dims_of(module)
        return state

    def placed(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    shapes = jax.eval_shape(start)
    state = jax.tree.map(placed, shapes, plan.shardings(shapes, made["dims"]))
    whole, weights = np.zeros((ROWS, length), np.int32), np.zeros((ROWS, length), np.float32)
    batch = jax.tree.map(lambda x: placed(x, plan.batch_sharding()), Batch(whole, whole, weights, whole, whole))
    step = make_train_step(made["graphdef"], sft_loss, tx, schedule, gradient_dtype=jnp.dtype(gradient))
    compiled = compile_step(step, state, batch, plan, "O1")
    costs = costs_of(parse(compiled.text), plan.axes, [device.id for device in plan.mesh.devices.flat])
    assert not costs.unknown
    out = collections.Counter()
    for transfer, times in costs.transfers.items():
        out[transfer.kind, transfer.axes] += transfer.bytes * times
    return out


def about(number):
    # Besides, there are norms' scales, sums of the loss and the norm of the gradient.
    return pytest.approx(number, rel=0.01)


def test_full_fine_tuning_gathers_each_weight_twice_and_reduces_its_gradient_once(transfers):
    got = transfers("none", fsdp=8)
    others = 7 / 8
    # The loss brings the tokens to the vocabulary, and their gradients back.
    assert got.pop(("all-gather", ("fsdp",))) == about((2 * WEIGHTS + TOKENS) * others)
    assert got.pop(("reduce-scatter", ("fsdp",))) == about((WEIGHTS + TOKENS) * others)
    # Embedded tokens: each chip looks a part of every row of the table up.
    assert got.pop(("all-to-all", ("fsdp",))) == about(2 * TOKENS / 8 * others)
    assert sum(got.values()) < 0.01 * WEIGHTS


def test_gradients_in_float32_are_reduced_in_it_and_weights_gathered_in_bfloat16_still(transfers):
    got = transfers("none", gradient="float32", fsdp=8)
    others = 7 / 8
    assert got.pop(("all-gather", ("fsdp",))) == about((2 * WEIGHTS + TOKENS) * others)
    assert got.pop(("reduce-scatter", ("fsdp",))) == about((2 * WEIGHTS + TOKENS) * others)
    assert got.pop(("all-to-all", ("fsdp",))) == about(2 * TOKENS / 8 * others)
    assert sum(got.values()) < 0.01 * WEIGHTS


def test_adapters_gather_the_base_twice_and_reduce_their_own_gradients_alone(transfers):
    got = transfers("lora", fsdp=8)
    others = 7 / 8
    assert got.pop(("all-gather", ("fsdp",))) == about((2 * WEIGHTS + TOKENS + 2 * ADAPTERS) * others)
    assert got.pop(("reduce-scatter", ("fsdp",))) == about(TOKENS * others)
    assert got.pop(("all-to-all", ("fsdp",))) == about(TOKENS / 8 * others)
    # An all-reduce receives twice what a reduce-scatter would.
    assert sum(got.values()) < 2.3 * ADAPTERS


@pytest.mark.parametrize("kind", ["none", "lora"])
def test_the_tensor_axis_exchanges_tokens_and_fsdp_weights(transfers, kind):
    got = transfers(kind, fsdp=2, tensor=4)
    tokens = TOKENS / 2 * 3 / 4  # of a chip's rows, from the three others that share them
    # Six gatherings a layer, in bfloat16: before attention and before the feed-forward, forward and again, and their
    # gradients backward. As many ways back, but for the last sum of a layer, which is not computed again.
    assert got.pop(("all-gather", ("tensor",))) == pytest.approx(6 * 3 * tokens, abs=2.1 * tokens)
    assert got.pop(("reduce-scatter", ("tensor",))) == pytest.approx(5 * 3 * tokens, abs=1.1 * tokens)
    adapters = 0 if kind == "none" else 2 * ADAPTERS / 2
    assert got.pop(("all-gather", ("fsdp",))) == pytest.approx(
        WEIGHTS / 4 + TOKENS / 2 + adapters, abs=0.02 * WEIGHTS / 4 + adapters
    )
    gradients = WEIGHTS / 4 / 2 if kind == "none" else 0
    # Of adapters some gradients are scattered too, in place of a whole sum.
    scattered = got.pop(("reduce-scatter", ("fsdp",)))
    assert scattered == about(gradients + TOKENS / 2) or (kind == "lora" and 0 < scattered - TOKENS / 2 < ADAPTERS / 2)
    # The gradient of the tokens by all parts of the vocabulary, embedded tokens, and what is as narrow as the rank.
    assert sum(got.values()) < 3.5 * tokens + (0 if kind == "none" else 2.3 * ADAPTERS)


def reckoned(family, length, **axes):
    """What the arithmetic of plans says of the same step, adapters trained."""
    run = config.default_config()
    run.model.path, run.data.train, run.model.dtype, run.model.remat = "hf://a/b", "rows.jsonl", "bfloat16", "full"
    run.data.max_length, run.train.batch_size, run.adapter.kind = length, ROWS, "lora"
    run = config.resolve(run)
    module = nnx.eval_shape(lambda: attached(family))
    sizes, cut = sizes_of(module), analytic.cut_of(run, axes, kernel=True)
    out = collections.Counter()
    for transfer, times in analytic.costs_of(run, sizes, cut, 0, 0).transfers.items():
        out[transfer.kind, transfer.axes] += transfer.bytes * times
    return out


def attached(family):
    module = models.random_model(models.config_from_hf(family), seed=0, dtype="bfloat16", param_dtype="bfloat16")
    attach_adapter(module, AdapterConfig(kind="lora", r=8), 0)
    return module


@pytest.mark.parametrize(
    ("family", "length", "axes"),
    [(SIZES, 512, {"fsdp": 2, "context": 4}), (EXPERTS, LENGTH, {"fsdp": 2, "expert": 4})],
    ids=["context", "expert"],
)
def test_what_rows_and_experts_exchange_is_what_the_arithmetic_of_plans_says(transfers, family, length, axes):
    got, said = transfers("lora", family=family, length=length, **axes), reckoned(family, length, **axes)
    axis = (list(axes)[1],)
    if family is EXPERTS:
        assert got["ragged-all-to-all", axis] == said["ragged-all-to-all", axis] > 0
        # Besides, there are the numbers of rows for each expert.
        assert got["all-gather", axis] + got["all-reduce", axis] < 0.01 * got["ragged-all-to-all", axis]
    else:
        # Besides, there are segments, which are a number a token.
        assert got["all-gather", axis] == about(said["all-gather", axis])
        assert got["reduce-scatter", axis] == said["reduce-scatter", axis] > 0
        assert got["all-reduce", axis] < 0.01 * got["all-gather", axis]
    # The table of embeddings and the loss, which arithmetic leaves out, move tokens in rows of the hidden size.
    weights = ("fsdp",) if family is EXPERTS else ("fsdp", "context")
    assert got["all-gather", weights] == pytest.approx(said["all-gather", weights], abs=2 * ROWS * length * 512 * 2)
