"""`model.remat='auto'` in runs: which policy they take, and that they keep it."""

import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

import jaxft
from jaxft.config import MeshConfig
from jaxft.errors import CheckpointError
from jaxft.hardware.topology import parse
from jaxft.planning import job
from jaxft.planning.shapes import shapes_of
from jaxft.runs.build import abstract_model, make_mesh
from jaxft.runs.fitting import _recorded_step
from jaxft.runs.identity.record import Record, read_record, write_record
from jaxft.runs.memory import recomputation
from jaxft.sharding.mesh import make_mesh_plan
from jaxft.training.log import TIMING_KEYS, read_metrics

CONFIG = str(Path(__file__).parents[2] / "configs" / "llama3_1_8b_lora.py") + ":smoke"
NO_LIMIT = 2**60


@pytest.fixture(scope="module")
def parts():
    """(config, abstract model, mesh) of a run."""
    config = jaxft.get_config(CONFIG)
    model = abstract_model(config)
    return config, model, make_mesh(config, model, jax.devices())


def chosen(parts, **options):
    return recomputation.recomputation_of(*parts, steps=10, **options)


def limit(monkeypatch, *limits):
    """Processes whose devices have so much memory."""
    monkeypatch.setattr(recomputation, "gather", lambda own: [*limits])


def test_cpus_take_dots_and_say_why(parts):
    choice = chosen(parts)
    assert choice.policy == "dots" and choice.limit is None
    assert "takes 'dots': its products are 1.0" in choice.describe() and "CPUs have no limit" in choice.describe()
    config, *rest = parts
    fixed = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="full"))
    assert chosen((fixed, *rest)) is None


def test_accelerators_that_tell_no_limit_recompute_everything():
    assert recomputation._without_limit("tpu")[0] == "full"


def test_a_run_counts_as_its_plan_does(parts, monkeypatch):
    config = parts[0]
    limit(monkeypatch, NO_LIMIT)
    step = job.sharded_step_of(
        job.abstract_step_of(config, shapes_of(config)[0], 10), config, parse("h100:8"), real=False
    )
    choice, plan = chosen(parts), job.recomputation_of(step)
    assert choice.policy == "none" and choice.peaks == plan.peaks and choice.products == plan.products
    assert choice.peaks["none"] > choice.peaks["full"] > sum(dataclasses.asdict(step.parts()).values())


def test_processes_take_the_choice_of_the_one_with_least_memory(parts, monkeypatch):
    limit(monkeypatch, NO_LIMIT)
    peaks = chosen(parts).peaks
    limit(monkeypatch, NO_LIMIT, int(peaks["full"] / 0.9) + 1)
    assert chosen(parts).policy == "full"
    limit(monkeypatch, NO_LIMIT, None)
    assert chosen(parts).limit is None


def test_the_same_devices_take_the_same_policy_again(parts, monkeypatch):
    limit(monkeypatch, NO_LIMIT)
    before = recomputation.recorded(dataclasses.replace(chosen(parts), policy="attention"), parts[2])
    again = chosen(parts, before=before)
    assert (again.policy, again.after) == ("attention", ("full", "offload"))
    assert "these devices took it before" in again.describe()
    for other in ({"device": "TPU v5e"}, {"axes": before["axes"] | {"fsdp": 1}}, {"policy": "unknown"}):
        assert chosen(parts, before=before | other).policy == "none"


def test_a_step_that_fits_is_compiled_once():
    compiled = []

    def count(name, seconds, **_):
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    step, x = jax.jit(lambda x: x @ x), jax.device_put(jnp.ones((8, 8)), make_mesh_plan(MeshConfig()).batch_sharding())
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        assert not recomputation.refused(step.lower(shape), 2**20)
        step(x)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert len(compiled) == 1
    assert recomputation.refused(step.lower(shape), 60)  # a device's rows are 32 bytes, in and out


def test_errors_that_are_not_of_memory_are_raised():
    class Lowered:
        def __init__(self, message):
            self.message = message

        def compile(self):
            raise jax.errors.JaxRuntimeError(self.message)

    full = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.1G of 15.75G hbm."
    assert recomputation.refused(Lowered(full), 1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        recomputation.refused(Lowered("INTERNAL: a bug"), 1)


def run(folder, steps, **settings):
    """What a run prints, and the metrics of its steps."""
    settings = {
        "output_dir": str(folder), "train.steps": steps, "train.eval_every": None, "checkpoint.every": 2,
        "data.eval_fraction": None, "checkpoint.best_metric": None, "export.merged": False,
        "optim.schedule": "constant", "optim.warmup_ratio": None, "optim.min_ratio": 0.0, **settings,
    }  # fmt: skip
    out = io.StringIO()
    jaxft.train(jaxft.get_config(CONFIG, settings), console=Console(file=out, width=1000))
    rows = [row for row in read_metrics(folder) if "loss" in row]
    return out.getvalue(), [{key: row[key] for key in row.keys() - TIMING_KEYS} for row in rows]


@pytest.mark.slow
def test_a_run_keeps_the_policy_that_the_compiler_took(tmp_path, monkeypatch):
    """The first one is refused. A run that goes on takes the other at once, and ends like one that had it always."""
    refusals, folder, first = iter([True, False, False]), tmp_path / "run", jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
    monkeypatch.setattr(recomputation, "memory_limit", lambda devices: NO_LIMIT)
    monkeypatch.setattr("jaxft.runs.fitting.refused", lambda lowered, limit: next(refusals))
    told, _ = run(folder, 2)
    assert "model.remat='auto' takes 'none'" in told and "the compiler refused 'none'" in told
    record = read_record(folder).recomputation
    assert record["policy"] == "dots" and record["limit_bytes"] == NO_LIMIT and record["products"] < 1.2
    assert json.loads((folder / "config.json").read_text())["model"]["remat"] == "auto"

    told, rows = run(folder, 3)
    assert "takes 'dots'" in told and "these devices took it before" in told and "same bits" not in told
    assert len(rows) == 3 and rows == run(tmp_path / "whole", 3, **{"model.remat": "dots"})[1]


def test_another_policy_than_before_is_told_and_kept_in_the_history(parts, tmp_path, monkeypatch):
    limit(monkeypatch, NO_LIMIT)
    config, _, mesh = parts
    choice, notes = chosen(parts), []
    run = SimpleNamespace(folder=tmp_path, config=config, mesh=mesh, recomputation=choice)
    log = SimpleNamespace(note=notes.append)
    write_record(tmp_path, Record())
    for start, now in ((0, choice), (2, choice)):
        assert _recorded_step(run, start, log, "graph", "step", now) == ("graph", "step")
    assert not notes and read_record(tmp_path).recomputation["policy"] == "none"

    _recorded_step(run, 4, log, "graph", "step", choice.refused())
    assert "the compiler refused 'none'" in notes[0]
    assert notes[1].startswith("model.remat is 'dots' from here on and was 'none' before, on cpu: the run computes")
    record = read_record(tmp_path)
    assert record.recomputation["policy"] == "dots"
    assert (record.history[-1]["step"], record.history[-1]["change"]) == (4, notes[1])


def test_a_damaged_choice_is_refused(tmp_path):
    values = {"jaxft_run": 1, "recomputation": {"policy": 3}, "history": []}
    (tmp_path / "jaxft_run.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="wrong types in recomputation"):
        read_record(tmp_path)
