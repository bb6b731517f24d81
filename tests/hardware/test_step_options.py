"""With which options training steps are compiled: by the kind of device, and the same in runs and thorough plans."""

import importlib.util
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.config import MeshConfig
from jaxft.hardware import attached
from jaxft.hardware.attached import step_options
from jaxft.hardware.chips import CHIPS
from jaxft.hardware.compile import ENVIRONMENT, Compiled, compile_step
from jaxft.runs import fitting
from jaxft.runs.session.session import Session
from jaxft.sharding.mesh import make_mesh_plan

OPTION = "xla_tpu_scoped_vmem_limit_kib"
KIB = 32768
V5E = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
KNOWS_OPTION = attached._knows_option


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    """One that knows the option, and no arguments of the user."""
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    monkeypatch.setattr(attached, "_knows_option", lambda *_: True)


@pytest.mark.parametrize(
    ("kind", "kib"),
    [
        ("TPU v5 lite", KIB), ("TPU v5e", KIB), ("TPU v5", 24576), ("TPU v5p", 24576), ("TPU v6 lite", None),
        ("TPU v4", None), ("TPU7x", None), ("TPU v9", None), ("NVIDIA H100 80GB HBM3", None), ("Tesla T4", None),
        ("cpu", None),
    ],
)  # fmt: skip
def test_tpus_that_were_measured_have_more_memory_for_fusions(kind, kib):
    assert step_options(SimpleNamespace(device_kind=kind)) == ({} if kib is None else {OPTION: kib})


def test_cpus_and_gpus_have_no_options():
    assert step_options(jax.devices("cpu")[0]) == {}
    assert not [chip.name for chip in CHIPS.values() if chip.maker == "gpu" and chip.fusion_kib is not None]


def test_the_value_of_the_user_counts(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--xla_tpu_other=1 --{OPTION}=16384")
    assert step_options(V5E) == {}
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_other=1")
    assert step_options(V5E) == {OPTION: KIB}


class Jitted(Exception):
    """What `jax.jit` of the next test raises in place of a program."""


@pytest.mark.parametrize(("device", "expected"), [(V5E, {OPTION: KIB}), (jax.devices("cpu")[0], {})])
def test_runs_sessions_and_plans_compile_steps_with_the_same_options(device, expected, monkeypatch):
    """Plans at O1 have none of them: they are to be quick."""
    seen = []

    def jit(function, **settings):
        seen.append(settings["compiler_options"])
        raise Jitted

    mesh = SimpleNamespace(mesh=SimpleNamespace(devices=np.array([device])), bind=lambda function: function)
    config = SimpleNamespace(train=SimpleNamespace(gradient_dtype=None), model=SimpleNamespace(dtype="bfloat16"))
    session = SimpleNamespace(mesh=mesh, config=config, _graphdef=None, _state=SimpleNamespace(trainable={}))
    run = SimpleNamespace(mesh=mesh, config=config, model=None)
    monkeypatch.setattr(jax, "jit", jit)
    monkeypatch.setattr(fitting, "make_step", lambda *_: None)
    for call in (
        lambda: fitting._jitted_step(run, None, None, {}, None),
        lambda: Session._jitted_gradients(session, lambda *_: None),
        lambda: compile_step(lambda *_: None, {}, {}, mesh, "default"),
        lambda: compile_step(lambda *_: None, {}, {}, mesh, "O1"),
    ):
        with pytest.raises(Jitted):
            call()
    assert seen == [expected] * 3 + [{}]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiles for a TPU with libtpu")
def test_the_compiler_gets_the_options_that_it_knows(monkeypatch, caplog):
    from jax.experimental import topologies

    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    monkeypatch.setattr(attached, "_knows_option", KNOWS_OPTION)
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=(1, 1, 1))
    mesh = make_mesh_plan(MeshConfig(), list(device.devices))
    x = jax.ShapeDtypeStruct((128, 128), jnp.bfloat16, sharding=mesh.batch_sharding())

    def compiled():
        return compile_step(lambda state, batch: (state + jnp.tanh(batch @ state), batch.sum()), x, x, mesh, "default")

    assert step_options(mesh.mesh.devices.flat[0]) == {OPTION: KIB}
    assert isinstance(compiled(), Compiled) and not caplog.records
    monkeypatch.setattr(attached, "VECTOR_MEMORY", "xla_tpu_no_such_option")
    assert step_options(mesh.mesh.devices.flat[0]) == {}
    assert isinstance(compiled(), Compiled)
    assert len(caplog.records) == 1 and "does not know the option xla_tpu_no_such_option" in caplog.text
    # The compiler is really asked, and would refuse.
    monkeypatch.setattr(attached, "_knows_option", lambda *_: True)
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_tpu_no_such_option'"):
        compiled()
