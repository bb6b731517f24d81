"""Cached log-probabilities of a reference: equal to live ones, kept for a resumed run, computed anew for other rows."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pair_runs import KINDS, LABELLED, ROWS, config_of, train_lose_the_end_and_resume, write_rows

from jaxft import api
from jaxft.errors import CheckpointError, ModelError
from jaxft.hardware.topology import parse
from jaxft.methods import method_of
from jaxft.methods.parts import reference_cache
from jaxft.methods.parts.reference import REFERENCE_LOGPS
from jaxft.methods.teacher import cache as teacher_cache
from jaxft.objectives.loss import with_batch_sums
from jaxft.optim.make import make_schedule
from jaxft.planning.job import abstract_step_of, sharded_step_of
from jaxft.planning.shapes import shapes_of
from jaxft.runs.build import abstract_model, build_model, make_tx, start_state
from jaxft.runs.train import set_up


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return {"dpo": write_rows(folder, ROWS, "pairs.jsonl"), "kto": write_rows(folder, LABELLED, "labelled.jsonl")}


def settings_of(method, rows, folder, reference="cached", **overrides):
    return config_of(method, rows[method], folder, **{f"method.{method}.reference": reference} | overrides)


def never():
    raise AssertionError("the reference is computed again")


def set_up_and_build(config):
    """(a run, its model): fresh, as training has them before the first step."""
    run = set_up(config)
    return run, build_model(config, run.mesh, random_base=run.folder / "base").module


CASES = [
    ("dpo", {"method.dpo.ld_alpha": 0.5}),
    ("dpo", KINDS["full"]),
    ("kto", {}),
    pytest.param("kto", KINDS["full"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("method", "fields"), CASES)
def test_cached_equals_live(rows, tmp_path, method, fields):
    """The loss and its gradient away from the start, within 1e-5; at the start, no divergence."""
    outcomes = {}
    for reference in ("auto", "cached"):
        config = settings_of(method, rows, tmp_path / reference, reference, **fields)
        run, model = set_up_and_build(config)
        parts = method_of(config)
        run = parts.precompute(run, lambda model=model: model)
        graphdef, state = start_state(config, model, make_tx(config, model, make_schedule(config.optim, 6)))
        assert reference == "auto" or state.method is None
        loss, sums_of, batch = parts.loss(config, run.model), parts.batch_sums(config, run.model), parts.feed(run, None)

        def means(trainable, batch, state=state, graphdef=graphdef, loss=loss, sums_of=sums_of):
            model = nnx.merge(graphdef, trainable, state.frozen)
            whole = None if sums_of is None else sums_of(model, batch, state.method)
            sums = loss(model, batch, None, with_batch_sums(state.method, whole))
            return sums.total / sums.weight, sums.means()

        moved = jax.tree.map(lambda x: x + 0.02 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), state.trainable)
        step = jax.jit(jax.value_and_grad(means, has_aux=True))
        outcomes[reference] = [step(weights, batch(state, 0)) for weights in (state.trainable, moved)]
        shapes, given = parts.batch_shapes(config), batch(state, 0)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), given) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    (_, start), _ = outcomes["cached"][0]
    assert float(start["loss"]) == pytest.approx({"dpo": math.log(2), "kto": 0.5}[method], abs=1e-5)
    assert abs(float(start["rewards/margins"])) < 1e-5 and float(start.get("kl", 0)) < 1e-5
    ((_, live), gradient), ((_, cached), other) = outcomes["auto"][1], outcomes["cached"][1]
    assert abs(float(live["rewards/margins"])) > 1e-4
    for name, value in live.items():
        np.testing.assert_allclose(cached[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, float(jnp.max(jnp.abs(b)))))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_resumed_run_reads_the_file_and_ends_bit_for_bit(rows, tmp_path, method):
    config = settings_of(method, rows, tmp_path / "run")
    (first, *_, last), summary = train_lose_the_end_and_resume(config, tmp_path / "run")
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-4) and last["loss"] < first["loss"]
    files = [tmp_path / name / "reference.npz" for name in ("whole", "run")]
    assert files[0].read_bytes() == files[1].read_bytes() and files[0].stat().st_mtime_ns == files[1].stat().st_mtime_ns
    # jaxft eval reads the held-out sums of the run, and writes nothing.
    evaluated = api.evaluate(api.load_model(str(tmp_path / "run")), api.load_tokenizer(str(tmp_path / "run")), config)
    assert evaluated["eval_loss"] == pytest.approx(summary["eval_loss"], rel=1e-4)
    assert files[0].stat().st_mtime_ns == files[1].stat().st_mtime_ns


def sums_of(examples):
    return [example.values[REFERENCE_LOGPS] for example in examples]


def test_only_what_changed_is_computed_anew(tmp_path):
    rows = {"dpo": write_rows(tmp_path, ROWS), "other": write_rows(tmp_path, ROWS[::-1], "other.jsonl")}
    config = settings_of("dpo", rows, tmp_path / "run")
    run, model = set_up_and_build(config)
    precompute, lines = method_of(config).precompute, []
    first = precompute(dataclasses.replace(run, print_line=lines.append), lambda: model)
    assert any("48 documents (train)" in line for line in lines) and any("(held out)" in line for line in lines)
    file = tmp_path / "run" / "reference.npz"
    before = file.stat().st_mtime_ns
    again = precompute(run, never)
    assert sums_of(again.data.train_examples) == sums_of(first.data.train_examples)
    assert sums_of(again.data.eval_examples) == sums_of(first.data.eval_examples)
    assert file.stat().st_mtime_ns == before
    # The rows change, but not the held-out ones.
    changed = dataclasses.replace(run, data=set_up(settings_of("dpo", {"dpo": rows["other"]}, tmp_path / "o")).data)
    changed = dataclasses.replace(changed, data=dataclasses.replace(changed.data, eval_examples=run.data.eval_examples))
    lines.clear()
    other = precompute(dataclasses.replace(changed, print_line=lines.append), lambda: model)
    assert [line for line in lines if "computed again" in line] and not [line for line in lines if "held out" in line]
    np.testing.assert_allclose(sums_of(other.data.train_examples)[::-1], sums_of(first.data.train_examples), atol=1e-3)
    # The same base with other times, as in a copy; then another base of the same shapes.
    weights = tmp_path / "run" / "base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    weights.write_bytes(content)
    precompute(changed, never)
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(AssertionError, match="computed again"):
        precompute(changed, never)
    file.write_bytes(b"damaged")
    with pytest.raises(AssertionError, match="computed again"):
        precompute(changed, never)


def test_whatever_is_damaged_in_the_file_of_the_cache_it_is_computed_again(tmp_path):
    file, hashes = tmp_path / "reference.npz", {"train": "key"}
    reference_cache._write(file, hashes, {"train": np.ones(3, np.float32)})
    whole = file.read_bytes()
    assert list(reference_cache._read(file, hashes)) == ["train"]
    broken = [whole[:length] for length in range(0, len(whole), 50)]
    for place in range(0, len(whole), 3):
        for bit in (1, 8, 128):
            broken.append(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
    for content in broken:
        file.write_bytes(content)
        sums = reference_cache._read(file, hashes)
        assert not sums or sums["train"].tolist() == [1.0, 1.0, 1.0]


def test_a_damaged_file_of_a_teacher_is_refused_with_the_mend(tmp_path):
    file = tmp_path / "hash" / "logps.npy"
    file.parent.mkdir()
    np.save(file, np.ones((5, 2), np.float32))
    whole = file.read_bytes()
    assert teacher_cache._rows_of(file, 5).shape == (5, 2)
    for content in (whole[:-1], whole[:20], b"", None, whole):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(CheckpointError, match="is damaged: .*Delete the folder .*/hash, and give the same command"):
            teacher_cache._rows_of(file, 6)


def test_an_evaluation_computes_held_out_rows_alone_and_writes_nothing(rows, tmp_path):
    config = settings_of("dpo", rows, tmp_path / "run")
    run, model = set_up_and_build(config)
    lines = []
    run = dataclasses.replace(run, held_out_only=True, print_line=lines.append)
    out = method_of(config).precompute(run, lambda: model)
    assert len(lines) == 1 and "(held out)" in lines[0] and not (tmp_path / "run" / "reference.npz").exists()
    assert len(sums_of(out.data.eval_examples)) == 4


def test_sets_of_a_mixture_have_their_sums(rows, tmp_path):
    mixture = {
        name: {"path": rows["dpo"], "weight": 1.0, "limit": limit} for name, limit in (("one", 8), ("other", 12))
    }
    config = settings_of("dpo", rows, tmp_path / "run", **{"data.train": "", "data.mixture": mixture})
    run, model = set_up_and_build(config)
    run = method_of(config).precompute(run, lambda: model)
    assert [len(sums_of(one.examples)) for one in run.data.sets] == [8, 12]
    batch = run.source.batch(0)
    assert (batch.values[REFERENCE_LOGPS] < 0).sum() == batch.segments_BS.max(axis=1).sum()


@pytest.mark.parametrize(
    "fields",
    [
        {"adapter.modules_to_save": "norm"},
        {"model.quantization": "nf4", "adapter.init_lora_weights": "loftq"},
    ],
    ids=["modules_to_save", "loftq"],
)
def test_the_reference_is_the_model_at_the_start_with_its_adapter(rows, tmp_path, fields):
    """So starts that a switched-off adapter does not undo are accepted, and the loss begins at ln 2."""
    config = settings_of("dpo", rows, tmp_path / "run", **fields)
    run, model = set_up_and_build(config)
    parts = method_of(config)
    parts.check(config, abstract_model(config))
    run = parts.precompute(run, lambda: model)
    batch, loss = parts.feed(run, None)(None, 0), parts.loss(config, run.model)
    graphdef, arrays = nnx.split(model)
    means = jax.jit(lambda arrays: loss(nnx.merge(graphdef, arrays), batch, None, None).means())(arrays)
    assert float(means["loss"]) == pytest.approx(math.log(2), abs=1e-5)


def test_plans_have_neither_the_pass_nor_the_copy(rows, tmp_path):
    parts, passes = {}, {}
    for reference in ("auto", "cached"):
        config = settings_of("dpo", rows, tmp_path, reference, **KINDS["full"])
        step = sharded_step_of(abstract_step_of(config, shapes_of(config)[0], 6), config, parse("h100:1", 1))
        parts[reference], passes[reference] = step.parts(), len(step.references)
    assert passes == {"auto": 1, "cached": 0}
    assert parts["auto"].method == parts["auto"].weights and parts["cached"].method == 0


def test_the_file_is_plain_arrays(rows, tmp_path):
    config = settings_of("dpo", rows, tmp_path / "run")
    run, model = set_up_and_build(config)
    method_of(config).precompute(run, lambda: model)
    with np.load(tmp_path / "run" / "reference.npz") as content:
        hashes = json.loads(str(content["hashes"]))
        assert set(hashes) == {"train", "held out"} and content[hashes["train"]].shape == (48,)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_log_probabilities_that_are_no_numbers_are_refused(value):
    logps = np.array([-1.5, value, -2.0], np.float32)
    with pytest.raises(ModelError, match=r"the reference gives row 8 .*\(held out\).*not all finite"):
        reference_cache._check_finite("held out", 7, logps)
    reference_cache._check_finite("held out", 7, logps[:1])
    if value == -np.inf:  # of a teacher: nothing remains beside the likeliest tokens
        teacher_cache._check_finite(7, logps)
    else:
        with pytest.raises(ModelError, match="the teacher gives training sequence 8"):
            teacher_cache._check_finite(7, logps)
