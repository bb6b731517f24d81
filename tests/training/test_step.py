"""The step: however a batch is cut, packed or spread over devices, it is the same step; and it is torch's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxft import models
from jaxft.checkpoint.hf import param_tensors
from jaxft.checkpoint.load import load_model
from jaxft.config import AdamWConfig, AdapterConfig, MeshConfig, OptimConfig
from jaxft.data.batch import Example
from jaxft.data.loader import Loader
from jaxft.nn.storage import storage_dims_of
from jaxft.objectives.loss import MethodState, Ratio, in_units_of
from jaxft.objectives.sft import sft_loss
from jaxft.optim.make import make_optimizer, make_schedule
from jaxft.runs.build import attach_adapter
from jaxft.sharding.mesh import make_mesh_plan
from jaxft.training.state import create, divide
from jaxft.training.step import make_eval_step, make_train_step
from jaxft.trees import flatten

OPTIM = OptimConfig(learning_rate=1e-2, schedule="constant", weight_decay=0.01)
ADAPTERS = {"full": AdapterConfig(kind="none"), "lora": AdapterConfig(r=4, target_modules="q_proj,down_proj")}


def examples(count=24, longest=14):
    """Documents of unlike lengths and unlike shares of trained tokens."""
    rng = np.random.default_rng(0)
    out = []
    for row in range(count):
        tokens = rng.integers(0, 61, rng.integers(4, longest)).astype(np.int32)
        mask = (rng.random(len(tokens)) < rng.random()).astype(np.uint8)
        mask[0], mask[-1] = 0, 1
        out.append(Example(tokens=tokens, mask=mask, row=row))
    return out


def make_batch(rows=8, packing=False, documents=None, length=16):
    loader = Loader(documents or examples(rows), batch_size=rows, max_length=length, packing=packing, shuffle=False)
    return loader.batch(0)


@functools.cache
def base_model():
    from jaxft.assets import ASSETS
    from jaxft.checkpoint.hf import read_json

    hf = read_json(str(ASSETS / "smoke" / "config.json"))
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.2}
    return models.random_model(models.config_from_hf(hf | sizes), seed=0)


def module_of(kind):
    module = nnx.merge(*nnx.split(base_model()))
    attach_adapter(module, ADAPTERS[kind], 0)
    return module


def setup(kind, *, accumulation_steps=1, dropout=0.0, optim=OPTIM):
    """(jitted step, state): the same start for the same kind."""
    module = nnx.merge(*nnx.split(base_model()))
    adapter = ADAPTERS[kind]
    attach_adapter(module, AdapterConfig(**{**vars(adapter), "dropout": dropout}), 0)
    schedule = make_schedule(optim, 100)
    tx = make_optimizer(optim, schedule)
    graphdef, state = create(module, tx, seed=0)
    # Fresh arrays: the base model is used again and a donated one is gone.
    state = jax.tree.map(jnp.copy, state)
    return jax.jit(make_train_step(graphdef, sft_loss, tx, schedule, accumulation_steps=accumulation_steps)), state


def assert_same(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


def gradient(kind, batch):
    """Sums of the loss and of its gradients over a batch."""
    graphdef, trainable, frozen = divide(module_of(kind))

    def total(trainable):
        sums = sft_loss(nnx.merge(graphdef, trainable, frozen), batch, None)
        return sums.total, sums

    return jax.jit(jax.grad(total, has_aux=True))(trainable)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_accumulating_four_parts_equals_one_whole(kind):
    batch = make_batch()
    per_part = batch.weights_BS.sum(axis=1).reshape(2, 4).sum(axis=0)
    assert len(set(per_part.tolist())) > 2  # a mean of means would differ
    states = []
    for parts in (1, 4):
        # Without Adam's division, which would blow up rounding where a gradient is nearly nothing.
        step, state = setup(
            kind, accumulation_steps=parts, optim=OptimConfig(adamw=AdamWConfig(eps=1e-1), schedule="constant")
        )
        states.append(step(state, batch))
    (one, one_metrics), (four, four_metrics) = states
    assert_same(one.trainable, four.trainable, 1e-6)
    assert_same(one_metrics, four_metrics, 1e-5)
    assert float(one_metrics["trained_tokens"]) == batch.weights_BS.sum()
    assert float(one_metrics["num_tokens"]) == (batch.segments_BS > 0).sum()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_packed_equals_unpacked(kind):
    documents = examples(12)
    apart = make_batch(12, packing=False, documents=documents)
    packed = Loader(documents, batch_size=12, max_length=32, packing=True, shuffle=False)
    rows = len(packed.plan)
    assert rows < 8
    packed = next(Loader(documents, batch_size=rows, max_length=32, packing=True, shuffle=False).eval_batches())
    grads, sums = gradient(kind, apart)
    packed_grads, packed_sums = gradient(kind, packed)
    assert_same(sums, packed_sums, 1e-3)  # sums of hundreds of nats
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
    assert_same(grads, packed_grads, 1e-5 * largest)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_eight_devices_equal_one(kind):
    batch, optim = make_batch(), OptimConfig(adamw=AdamWConfig(eps=1e-1), schedule="constant")
    step, start = setup(kind, optim=optim)
    expected, expected_metrics = step(start, batch)
    dims = storage_dims_of(module_of(kind))
    for data, fsdp in {"full": [(2, 4)], "lora": [(8, 1), (1, 8), (2, 4)]}[kind]:
        plan = make_mesh_plan(MeshConfig(data=data, fsdp=fsdp))
        step, state = setup(kind, optim=optim)
        state = plan.shard(state, dims)
        out, metrics = step(state, jax.device_put(batch, plan.batch_sharding()))
        assert_same(out.trainable, expected.trainable, 1e-6)
        assert_same(metrics, expected_metrics, 1e-5)
        # The step leaves every array where the plan put it, moments included.
        wanted = jax.tree.leaves(plan.shardings(state, dims))
        for leaf, sharding in zip(jax.tree.leaves(out), wanted, strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_the_step_is_traced_and_compiled_once(caplog):
    traces = []

    def counted(model, batch, key, method):
        traces.append(1)
        return sft_loss(model, batch, key)

    schedule = make_schedule(OPTIM, 100)
    tx = make_optimizer(OPTIM, schedule)
    module = nnx.merge(*nnx.split(base_model()))
    attach_adapter(module, ADAPTERS["lora"], 0)
    plan = make_mesh_plan(MeshConfig(data=2, fsdp=4))
    graphdef, state = create(module, tx, seed=0)
    state = plan.shard(jax.tree.map(jnp.copy, state), storage_dims_of(module))
    step = jax.jit(make_train_step(graphdef, counted, tx, schedule), donate_argnums=0)
    losses = []
    with jax.log_compiles(), caplog.at_level("WARNING", logger="jax"):
        for _ in range(4):
            state, metrics = step(state, jax.device_put(make_batch(), plan.batch_sharding()))
            losses.append(float(metrics["loss"]))
    assert len(traces) == 1
    assert sum("Finished XLA compilation of jit(train_step)" in message for message in caplog.messages) == 1
    assert int(state.step) == 4
    assert losses == sorted(losses, reverse=True)


def test_only_the_adapter_moves_and_its_moments_are_float32():
    step, state = setup("lora")
    out, metrics = step(state, make_batch())
    jax.tree.map(np.testing.assert_array_equal, out.frozen, state.frozen)
    assert {path.rsplit("/", 1)[-1] for path in flatten(out.trainable)[0]} == {"lora_a", "lora_b"}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(out.trainable))
    moments = [leaf for leaf in jax.tree.leaves(out.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(out.trainable))
    assert all(leaf.dtype == jnp.float32 for leaf in moments)
    assert set(metrics) == {
        "loss", "grad_norm", "learning_rate", "mean_token_accuracy", "num_tokens", "trained_tokens",
    }  # fmt: skip


def test_full_fine_tuning_of_a_half_precision_model_moves_float32():
    config = base_model().config
    module = models.random_model(config, seed=0, param_dtype="bfloat16")
    _, state = create(module, make_optimizer(OPTIM, make_schedule(OPTIM, 10)), seed=0)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.trainable))
    assert not jax.tree.leaves(state.frozen)


def test_a_batch_without_a_trained_token_is_skipped_if_the_step_may():
    """Neither momentum nor decay moves the parameters, the loss is 0, and the learning rate goes on."""
    optim = OptimConfig(learning_rate=1e-2, schedule="linear", weight_decay=0.1)
    schedule = make_schedule(optim, 10)
    tx = make_optimizer(optim, schedule)
    graphdef, start = create(module_of("lora"), tx, seed=0)
    start = jax.tree.map(jnp.copy, start)
    step = jax.jit(make_train_step(graphdef, sft_loss, tx, schedule, skips_empty=True))
    plain = jax.jit(make_train_step(graphdef, sft_loss, tx, schedule))
    batch = make_batch()
    empty = batch._replace(weights_BS=np.zeros_like(batch.weights_BS))
    one, metrics = step(start, batch)
    expected, expected_metrics = plain(start, batch)
    assert_same(one.trainable, expected.trainable, 1e-7)
    assert metrics["skipped_updates"] == 0 and metrics["loss"] == expected_metrics["loss"]
    two, metrics = step(one, empty)
    assert metrics["skipped_updates"] == 1 and metrics["loss"] == 0 and metrics["grad_norm"] == 0
    assert int(two.step) == 2 and metrics["trained_tokens"] == 0
    jax.tree.map(np.testing.assert_array_equal, two.trainable, one.trainable)
    counts = {name: int(x) for name, x in flatten(two.opt_state)[0].items() if name.endswith("count")}
    assert sorted(counts.values()) == [1, 2]  # Adam's, and that of the learning rate
    three, metrics = step(two, batch)
    assert float(metrics["learning_rate"]) == pytest.approx(float(schedule(2)))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, two.trainable), two.opt_state, two.trainable)
    assert any(bool(jnp.any(x)) for x in jax.tree.leaves(updates))  # what an update without gradients would do
    assert any(
        bool(jnp.any(a != b)) for a, b in zip(*map(jax.tree.leaves, (three.trainable, two.trainable)), strict=True)
    )
    assert np.isnan(plain(one, empty)[1]["loss"])


@pytest.mark.slow
def test_dropout_differs_by_step_and_by_micro_batch_and_repeats_by_seed():
    batch = make_batch()
    step, state = setup("lora", dropout=0.5)
    # B is zero at first: only then does dropout show.
    state = state._replace(trainable=jax.tree.map(lambda x: x + 0.1, state.trainable))
    first, again = step(state, batch)[1]["loss"], step(state, batch)[1]["loss"]
    later = step(state._replace(step=jnp.int32(1)), batch)[1]["loss"]
    assert float(first) == float(again) != float(later)
    twins = jax.tree.map(lambda x: np.repeat(x[:4], 2, axis=0), batch)  # both halves hold the same rows
    halves, _ = setup("lora", dropout=0.5, accumulation_steps=2)
    whole, _ = setup("lora", dropout=0.5)
    alone = jax.tree.map(lambda x: x[:4], batch)
    assert float(halves(state, twins)[1]["loss"]) != pytest.approx(float(whole(state, alone)[1]["loss"]), abs=1e-6)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_sums_over_the_whole_batch_reach_every_micro_batch(kind):
    """A loss over two kinds of units, tokens and documents, does not depend on how the batch is cut."""
    batch, optim = make_batch(16), OptimConfig(adamw=AdamWConfig(eps=1e-1), schedule="constant")

    def units(model, batch, state):
        assert state is None
        return {"tokens": jnp.sum(batch.weights_BS), "documents": jnp.sum(jnp.max(batch.segments_BS, axis=1))}

    def loss(model, batch, key, state):
        sums = sft_loss(model, batch, key)
        hidden_BSD, _ = model(batch.tokens_BS, batch.positions_BS, batch.segments_BS)
        starts_BS = (batch.segments_BS > 0) & (batch.positions_BS == 0)
        other = jnp.sum(jnp.mean(hidden_BSD**2, axis=-1) * starts_BS)
        factor = in_units_of(state.batch["tokens"], Ratio(jnp.float32(3), state.batch["documents"]))
        return sums._replace(total=sums.total + factor * other)

    def direct(trainable):
        sums = loss(
            nnx.merge(graphdef, trainable, start.frozen), batch, None, MethodState(batch=units(None, batch, None))
        )
        return sums.total / sums.weight

    schedule = make_schedule(optim, 10)
    module = nnx.merge(*nnx.split(base_model()))
    if kind == "lora":
        attach_adapter(module, AdapterConfig(r=4), 0)
    tx = make_optimizer(optim, schedule)
    graphdef, start = create(module, tx, seed=0)
    outcomes = []
    for parts in (1, 4):
        step = make_train_step(graphdef, loss, tx, schedule, accumulation_steps=parts, batch_sums=units)
        outcomes.append(jax.jit(step)(start, batch))
    (one, one_metrics), (four, four_metrics) = outcomes
    assert one.method is None and four.method is None
    assert_same(one.trainable, four.trainable, 1e-6)
    assert_same(one_metrics, four_metrics, 1e-5)
    value, grads = jax.jit(jax.value_and_grad(direct))(start.trainable)
    assert float(one_metrics["loss"]) == pytest.approx(float(value), rel=1e-6)
    assert float(one_metrics["grad_norm"]) == pytest.approx(float(optax.global_norm(grads)), rel=1e-5)


def test_evaluation_is_without_dropout():
    module = nnx.merge(*nnx.split(base_model()))
    attach_adapter(module, AdapterConfig(r=4, dropout=0.5), 0)
    graphdef, trainable, frozen = divide(module)
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    sums = jax.jit(make_eval_step(graphdef, sft_loss))(trainable, frozen, None, make_batch())
    plain = jax.jit(lambda: sft_loss(nnx.merge(graphdef, trainable, frozen), make_batch(), None))()
    assert float(sums.total) == float(plain.total)


def test_two_steps_of_full_fine_tuning_equal_torch(tiny_llama, torch_llama):
    torch = pytest.importorskip("torch")
    folder = tiny_llama("tied")
    optim = OptimConfig(learning_rate=1e-3, schedule="linear", weight_decay=0.1, adamw=AdamWConfig(eps=1e-4))
    schedule = make_schedule(optim, 10)
    module = load_model(folder).module
    tx = make_optimizer(optim, schedule)
    graphdef, state = create(module, tx, seed=0)
    step = jax.jit(make_train_step(graphdef, sft_loss, tx, schedule, accumulation_steps=2))
    batch = make_batch(4)

    reference = torch_llama(folder).train()
    decayed = [p for p in reference.parameters() if p.ndim > 1]
    others = [p for p in reference.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        eps=1e-4,
        betas=(0.9, 0.999),
    )
    labels = torch.full(batch.tokens_BS.shape, -100)
    trained = torch.tensor(batch.weights_BS[:, :-1] > 0)
    labels[:, 1:][trained] = torch.tensor(batch.targets_BS[:, :-1]).long()[trained]
    for number in range(2):
        state, metrics = step(state, batch)
        optimizer.zero_grad()
        out = reference(
            torch.tensor(batch.tokens_BS).long(),
            attention_mask=torch.tensor(batch.segments_BS > 0).long(),
            labels=labels,
        )
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(number))
        optimizer.step()
        assert float(metrics["loss"]) == pytest.approx(out.loss.item(), abs=1e-5)
        assert float(metrics["grad_norm"]) == pytest.approx(norm.item(), rel=1e-5)
    expected = {name: p.detach().numpy() for name, p in reference.named_parameters()}
    trainable = flatten(state.trainable)[0]
    for path, placed in param_tensors(module).items():
        for piece in placed.pieces:
            part = np.asarray(trainable[path][piece.at])
            np.testing.assert_allclose(
                placed.transform.to_hf(part), expected[piece.hf], rtol=0, atol=1e-5, err_msg=piece.hf
            )


def test_gradients_of_matrices_are_kept_in_the_type_that_is_asked_for():
    kept = {}

    def spying():
        def update(grads, state, params=None):
            kept.update({path: leaf.dtype for path, leaf in flatten(grads)[0].items()})
            return grads, state

        return optax.GradientTransformation(lambda params: (), update)

    module = nnx.merge(*nnx.split(base_model()))
    graphdef, state = create(module, spying(), seed=0)
    schedule = make_schedule(OPTIM, 10)
    metrics = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        step = make_train_step(graphdef, sft_loss, spying(), schedule, gradient_dtype=dtype)
        text = jax.jit(step).lower(state, make_batch()).as_text()
        metrics[dtype] = jax.jit(step)(state, make_batch())[1]
        assert ("bf16" in text) == (dtype == jnp.bfloat16)
    # The update itself is always in float32.
    assert set(kept.values()) == {jnp.dtype("float32")}
    np.testing.assert_allclose(metrics[jnp.bfloat16]["loss"], metrics[jnp.float32]["loss"], rtol=2e-2)
    np.testing.assert_allclose(metrics[jnp.bfloat16]["grad_norm"], metrics[jnp.float32]["grad_norm"], rtol=5e-2)
