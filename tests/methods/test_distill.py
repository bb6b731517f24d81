"""Distillation as a whole run: it learns, resumes bit for bit, is the same on 8 devices, caches, and is planned."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from pair_runs import KINDS, SGD, assert_eight_devices_equal_one, config_of, train_lose_the_end_and_resume

from jaxft import api, models
from jaxft.assets import ASSETS
from jaxft.checkpoint import hf
from jaxft.config import MeshConfig
from jaxft.errors import ConfigError
from jaxft.hardware.topology import parse
from jaxft.methods import distill, method_of
from jaxft.methods.teacher.frozen import FrozenModel
from jaxft.optim.make import make_schedule
from jaxft.planning.job import abstract_step_of, measure, sharded_step_of
from jaxft.planning.shapes import shapes_of
from jaxft.runs.build import (
    abstract_model,
    build_model,
    check_frozen,
    load_frozen,
    make_step,
    make_tx,
    start_state,
    with_frozen,
)
from jaxft.sharding.mesh import make_mesh_plan
from jaxft.training.state import saved_part

ROWS = [{"prompt": f"Colour {n}?", "completion": f" {n % 3} red, {n % 5} blue"} for n in range(24)]
slow = pytest.mark.slow


def write_teacher(folder, vocab=259):
    """A wider model than the student, with other weights and the same tokenizer."""
    shutil.copytree(ASSETS / "smoke", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 128, "intermediate_size": 192, "vocab_size": vocab, "tie_word_embeddings": False}
    family = models.config_from_hf(config)
    model = models.random_model(family, seed=5)
    nnx.update(model, jax.tree.map(lambda x: 3 * x if x.ndim > 2 else x, nnx.state(model)))
    model.lm_head.kernel[...] = 10 * model.lm_head.kernel[...]
    hf.write_weights(model, str(folder))
    hf.write_config(str(folder), config, dtype="float32")
    return str(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teachers") / "teacher")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture
def run_of(rows, teacher, tmp_path):
    """run_of(**overrides) -> the config of a small run in tmp_path / "run"."""
    return lambda **overrides: config_of(
        "distill", rows, tmp_path / "run", **{"method.distill.teacher": teacher} | overrides
    )


SETTINGS = {"method.distill.temperature": 1.5, "method.distill.sft_weight": 0.25}


@pytest.fixture(scope="module")
def live(rows, teacher, tmp_path_factory):
    """(config, logged lines, summary) of a run that lost its end and went on, bit for bit as before."""
    folder = tmp_path_factory.mktemp("live") / "run"
    config = config_of("distill", rows, folder, **SETTINGS | {"method.distill.teacher": teacher})
    return config, *train_lose_the_end_and_resume(config, folder)


def check_learned(config, lines, summary):
    first, *_, last = lines
    assert last["loss"] < first["loss"] and last["divergence"] < first["divergence"]
    assert first["loss"] == pytest.approx(0.75 * first["divergence"] + 0.25 * first["nll"], rel=1e-5)
    assert set(config.method.chosen.HELD_OUT_METRICS) <= set(summary)
    assert not (Path(config.output_dir) / "teacher").exists()


def test_a_run_learns_and_resumes_bit_for_bit(live):
    config, lines, summary = live
    check_learned(config, lines, summary)
    folder = config.output_dir
    evaluated = api.evaluate(api.load_model(folder), api.load_tokenizer(folder), config)
    for name in config.method.chosen.HELD_OUT_METRICS:
        assert evaluated[name] == pytest.approx(summary[name], rel=1e-4, abs=1e-5), name


@slow
@pytest.mark.parametrize("kind", ["full", "qlora"])
def test_other_kinds_learn_and_resume_bit_for_bit(run_of, tmp_path, kind):
    config = run_of(**KINDS[kind] | SETTINGS)
    check_learned(config, *train_lose_the_end_and_resume(config, tmp_path / "run"))


def test_cached_log_probabilities_of_the_whole_vocabulary_equal_the_teacher(live, run_of, tmp_path, monkeypatch):
    """They are computed once: a resumed run does not load the teacher."""
    loads, load = [], FrozenModel.load
    monkeypatch.setattr(FrozenModel, "load", lambda self, mesh: loads.append(1) or load(self, mesh))
    config = run_of(**SETTINGS | {"method.distill.cache_top_k": 259})
    lines, summary = train_lose_the_end_and_resume(config, tmp_path / "run")
    assert len(loads) == 1
    training, held_out = (tmp_path / "run" / "teacher").iterdir()
    for folder in (training, held_out):
        assert sorted(path.name for path in folder.iterdir()) == ["ids.npy", "logps.npy"]
    model, tokenizer = api.load_model(str(tmp_path / "run")), api.load_tokenizer(str(tmp_path / "run"))
    evaluated = [api.evaluate(model, tokenizer, config)]
    assert len(loads) == 1
    # Without a run folder nothing is kept.
    evaluated.append(api.evaluate(model, tokenizer, dataclasses.replace(config, output_dir=str(tmp_path / "none"))))
    assert len(loads) == 2 and not (tmp_path / "none").exists()
    for one in evaluated:
        assert one["eval_loss"] == pytest.approx(summary["eval_loss"], rel=1e-4)
    _, live_lines, live_summary = live
    for ours, theirs in zip(lines, live_lines, strict=True):
        for name in ("loss", "divergence", "nll", "teacher_agreement"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    assert lines[0]["grad_norm"] == pytest.approx(live_lines[0]["grad_norm"], rel=1e-4)
    for name in ("eval_loss", "eval_divergence", "eval_teacher_agreement"):
        assert summary[name] == pytest.approx(live_summary[name], rel=1e-3), name


def test_other_settings_have_another_cache(run_of, teacher):
    from jaxft.methods.teacher.cache import _hash

    config = run_of(**{"method.distill.cache_top_k": 4})
    examples = distill.METHOD.prepare(config, api.load_tokenizer(config.model.path)).train_examples
    base = _hash(config, distill.teacher_of(config), examples)
    assert base == _hash(config, distill.teacher_of(config), examples)
    for change in ({"cache_top_k": 5}, {"temperature": 2.0}, {"teacher_quantization": "nf4"}):
        other = run_of(**{"method.distill.cache_top_k": 4} | {f"method.distill.{k}": x for k, x in change.items()})
        assert _hash(other, distill.teacher_of(other), examples) != base
    assert _hash(config, distill.teacher_of(config), examples[1:]) != base


@pytest.mark.parametrize("kind", ["lora", *(pytest.param(kind, marks=slow) for kind in ("full", "qlora"))])
def test_eight_devices_equal_one(run_of, tmp_path, kind):
    metrics = assert_eight_devices_equal_one(run_of(**KINDS[kind] | SGD), tmp_path)
    assert float(metrics["loss"]) > 0.05


def test_micro_batches_change_nothing(run_of, tmp_path):
    outcomes = []
    for parts in (1, 4):
        config = run_of(**SGD | {"train.accumulation_steps": parts, "method.distill.beta": 1.0})
        method, tokenizer = method_of(config), api.load_tokenizer(config.model.path)
        batch = method.source(config, method.prepare(config, tokenizer), tokenizer).batch(0)
        module = build_model(config, random_base=tmp_path / "base").module
        mesh, schedule = make_mesh_plan(MeshConfig(), jax.devices()[:1]), make_schedule(config.optim, 6)
        tx = make_tx(config, module, schedule)
        graphdef, state = start_state(config, module, tx, mesh)
        state = with_frozen(state, load_frozen(config, mesh))
        assert set(saved_part(state)) == {"step", "trainable", "opt_state", "key"}
        outcomes.append(jax.jit(make_step(config, abstract_model(config), graphdef, tx, schedule))(state, batch))
    (state, metrics), (other, others) = outcomes
    assert {name: float(x) for name, x in others.items()} == pytest.approx(
        {name: float(x) for name, x in metrics.items()}, rel=1e-5
    )
    for a, b in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(other.trainable), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-6)


def test_a_teacher_is_kept_in_its_own_type_or_quantized(run_of, tmp_path):
    mesh = make_mesh_plan(MeshConfig(), jax.devices()[:1])
    path = write_teacher(tmp_path / "bfloat16")
    config = json.loads((tmp_path / "bfloat16" / "config.json").read_text())
    (tmp_path / "bfloat16" / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    sizes = {}
    for name, changes in {
        "float32": {}, "bfloat16": {"method.distill.teacher": path},
        "nf4": {"method.distill.teacher_quantization": "nf4"},
        "drawn": {"method.distill.teacher_random_init": True},
    }.items():  # fmt: skip
        held = load_frozen(run_of(**changes), mesh)
        sizes[name] = sum(leaf.nbytes for leaf in jax.tree.leaves(held))
    assert sizes["bfloat16"] == sizes["float32"] / 2 and sizes["drawn"] == sizes["float32"]
    assert sizes["nf4"] < 0.6 * sizes["float32"]


REFUSED = [
    ({"method.distill.teacher": None}, r"method.distill.teacher is None: set it to a Hugging Face folder"),
    ({"adapter.kind": "prompt"}, r"adapter.kind='prompt' puts virtual tokens into every row, which the teacher"),
    ({"method.distill.cache_top_k": 300}, r"cache_top_k=300 is more than the 259 tokens of the vocabulary"),
    ({"router.z_loss": 0.1}, r"router.z_loss=0.1 are losses on the routers of experts"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=["no teacher", "prompt", "top k", "router"])
def test_settings_that_it_cannot_train_with_are_refused(run_of, overrides, message):
    config = run_of(**overrides)
    with pytest.raises(ConfigError, match=message):
        distill.check(config, abstract_model(config))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("beta", 1.5, r"method.distill.beta=1.5 must be from 0 to 1"),
        ("temperature", 0.0, r"method.distill.temperature=0.0 must be above zero"),
        ("sft_weight", 1.0, r"method.distill.sft_weight=1.0 must be at least 0 and below 1"),
        ("cache_top_k", 0, r"method.distill.cache_top_k=0 must be above zero"),
    ],
)
def test_numbers_out_of_range_are_refused(run_of, field, value, message):
    with pytest.raises(ConfigError, match=message):
        run_of(**{f"method.distill.{field}": value})


def test_a_teacher_with_another_vocabulary_is_refused_before_its_weights_are_read(run_of, teacher, tmp_path):
    def checked(path, **overrides):
        config = run_of(**{"method.distill.teacher": str(path)} | overrides)
        tokenizer = api.load_tokenizer(config.model.path)
        mesh = make_mesh_plan(config.mesh, jax.devices())
        check_frozen(config, abstract_model(config), tokenizer, mesh)

    checked(teacher)
    other = tmp_path / "other"
    shutil.copytree(teacher, other, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    with pytest.raises(ConfigError, match=r"vocabulary of 300 tokens and the trained model one of 259.*same family"):
        checked(other)
    with pytest.raises(ConfigError, match=r"vocabulary of 300 tokens"):
        checked(other, **{"method.distill.cache_top_k": 4})
    (other / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    with pytest.raises(ConfigError, match=r"data.max_length=128 is beyond the 64 positions of method.distill.teacher"):
        checked(other)
    scores = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    (other / "config.json").write_text(json.dumps(config | scores))
    with pytest.raises(ConfigError, match=r"method.distill.teacher=.* is a reward model: it has a score head"):
        checked(other)
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"mesh.tensor=8 does not divide 4 query heads"):
        checked(other, **{"mesh.tensor": 8, "mesh.fsdp": 1})
    tokens = json.loads((other / "tokenizer.json").read_text())
    vocab = tokens["model"]["vocab"]
    a, b = list(vocab)[:2]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(ConfigError, match=r"tokenizer of method.distill.teacher=.* differs .* in 2 tokens"):
        checked(other)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_teacher_is_in_estimates_of_plans(run_of, kind):
    """Its memory is the method's and its work is that of its own sizes; a cached one is data alone."""
    steps, costs = {}, {}
    for name, changes in {
        "sft": {"method.name": "sft", "method.distill.teacher": None}, "live": {},
        "cached": {"method.distill.cache_top_k": 8},
    }.items():  # fmt: skip
        config = run_of(**KINDS[kind] | changes)
        step = abstract_step_of(config, shapes_of(config)[0], 6)
        steps[name] = sharded_step_of(step, config, parse("h100:1", 1))
        costs[name] = measure(steps[name], "O1")
    mesh = make_mesh_plan(MeshConfig(), jax.devices()[:1])
    loaded = load_frozen(run_of(**KINDS[kind]), mesh)
    assert steps["live"].parts().method == sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))
    (sizes,) = steps["live"].references
    assert sizes.width == 128 and steps["sft"].sizes.width == 64
    forward = sizes.forward_flops(8, 128)
    assert steps["live"].model_flops == steps["sft"].model_flops + forward
    assert costs["live"].costs.flops >= costs["sft"].costs.flops + forward
    assert steps["cached"].parts().method == 0 and steps["cached"].model_flops == steps["sft"].model_flops
    assert steps["cached"].parts().batch - steps["sft"].parts().batch == 8 * 128 * (8 + 9) * 4


def test_the_teacher_is_split_over_the_devices_of_a_plan(run_of):
    config = run_of(**{"mesh.fsdp": 2, "mesh.tensor": 2})
    step = abstract_step_of(config, shapes_of(config)[0], 6)
    split, whole = (
        sharded_step_of(step, dataclasses.replace(config, mesh=mesh), parse(f"h100:{mesh.fsdp * mesh.tensor}", 1))
        for mesh in (config.mesh, MeshConfig(fsdp=1))
    )
    assert split.parts().method < 0.35 * whole.parts().method


@slow
def test_it_is_planned_for_a_tpu(run_of):
    pytest.importorskip("libtpu")
    plan = partial(api.plan, topology="v5e:1x1")
    live, alone = plan(run_of()), plan(run_of(**{"method.name": "sft", "method.distill.teacher": None}))
    assert live["fits"] and live["argument_parts"]["method"] > live["argument_parts"]["weights"]
    forward = live["model_flops_per_step"] - alone["model_flops_per_step"]
    assert live["hardware_flops_per_step"] > alone["hardware_flops_per_step"] + 0.8 * forward > 0
