"""GPUs that are not here: which can be compiled for, and, where the plugin is installed, a small step that is."""

import contextlib
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import jaxft
from jaxft import config
from jaxft.config import MeshConfig
from jaxft.hardware import analytic, gpu_compile, hlo
from jaxft.hardware.chips import CHIPS
from jaxft.hardware.compile import Compiled, Memory, TooLarge, compile_step, traced_for
from jaxft.hardware.costs import costs_of
from jaxft.hardware.products import target_of
from jaxft.hardware.topology import parse
from jaxft.nn.attention.causal import causal_attention
from jaxft.nn.experts.grouped import grouped
from jaxft.optional import tokamax_module
from jaxft.planning import job
from jaxft.planning import process as planning
from jaxft.planning.shapes import length_of, shapes_of
from jaxft.runs.build import make_mesh
from jaxft.sharding.mesh import make_mesh_plan

CONFIGS = Path(__file__).parents[2] / "configs"
SMOKE = f"{CONFIGS / 'llama3_1_8b_lora.py'}:smoke"
NO_PLUGIN = "JAX's CUDA plugin is not installed: pip install 'jaxft[plan-gpu]'"
HALF = ["train.batch_size=8", "train.accumulation_steps=1", "model.remat=full", "model.dtype=bfloat16"]


@pytest.mark.parametrize(
    ("topology", "slices", "expected"),
    [("h100:1", 1, True), ("h200:8", 1, True), ("h100:8", 2, False), ("l4:1", 1, False), ("v5e:1x1", 1, False)],
)
def test_known_cards_of_one_host_can_be_compiled_for(topology, slices, expected, monkeypatch):
    monkeypatch.setattr(gpu_compile, "has_plugin", lambda: True)
    assert gpu_compile.can_compile(parse(topology, slices)) == expected
    monkeypatch.setattr(gpu_compile, "has_plugin", lambda: False)
    assert not gpu_compile.can_compile(parse(topology, slices))


def test_cards_are_those_of_the_table_of_chips():
    for name, card in gpu_compile.CARDS.items():
        assert card.memory == pytest.approx(CHIPS[name].hbm_bytes, rel=0.07)
        assert card.bandwidth == pytest.approx(CHIPS[name].hbm_bandwidth, rel=0.01)


def test_steps_for_gpus_are_compiled_at_the_level_of_runs(monkeypatch):
    asked = []

    def refuse(step, state, batch, mesh, level, options):
        asked.append((level, options))
        return TooLarge(used=None, temporaries=None, limit=None, message="too large")

    monkeypatch.setattr(gpu_compile, "has_plugin", lambda: True)
    monkeypatch.setattr(job, "compile_step", refuse)
    run = config.load(SMOKE, HALF)
    abstract = job.abstract_step_of(run, shapes_of(run)[0], 1)
    costs = job.measure(job.sharded_step_of(abstract, run, parse("h100:4"), real=False), "O1")
    assert asked == [("default", gpu_compile.OPTIONS)]
    assert costs.level == "default" and costs.refused == "too large"


# MiB in which cuDNN 9.28 said that its backward attention works on an A100, for two rows of 4,096 tokens and 32 heads.
@pytest.mark.parametrize(
    ("parts", "kv_heads", "head_dim", "said"),
    [(1, 8, 128, 385), (1, 32, 128, 257), (1, 8, 64, 193), (2, 8, 128, 256.5), (2, 32, 128, 128.5)],
)
def test_the_memory_in_which_attention_works_is_what_cudnn_says(parts, kv_heads, head_dim, said):
    assert gpu_compile.attention_workspace(8192 // parts, 8192, 32, kv_heads, head_dim) == said * 2**20


# Of a context axis of two: half of the queries, and all keys.
BACKWARD = """
HloModule attention

ENTRY %main (q: bf16[2,128,8,64], k: bf16[2,256,2,64]) -> bf16[2,8,128,64] {{
  %q = bf16[2,128,8,64]{{3,2,1,0}} parameter(0)
  %k = bf16[2,256,2,64]{{3,2,1,0}} parameter(1)
  %attention.1 = (bf16[2,8,128,64]{{3,1,2,0}}, bf16[2,2,256,64]{{3,1,2,0}}, bf16[2,2,256,64]{{3,1,2,0}}, u8[0]{{0}})
    custom-call(%q, %k, %k), custom_call_target="{target}", backend_config={{}}
  ROOT %gradient = bf16[2,8,128,64]{{3,1,2,0}} get-tuple-element(%attention.1), index=0
}}
"""


def test_a_compiled_step_needs_the_memory_in_which_attention_works(monkeypatch):
    backward = BACKWARD.format(target="__cudnn$fmhaScaleBiasSoftmaxBackward")
    needed = gpu_compile.kernel_workspace(hlo.parse(backward))
    assert needed == gpu_compile.attention_workspace(2 * 128, 2 * 256, 8, 2, 64) > 0
    assert gpu_compile.kernel_workspace(hlo.parse(BACKWARD.format(target="__cudnn$fmhaScaleBiasSoftmax"))) == 0
    assert gpu_compile.kernel_workspace(hlo.parse(backward.replace("u8[0]", "u8[4096]"))) == 0  # counted by XLA

    memory = Memory(arguments=7, outputs=0, aliased=0, temporaries=11, code=0)
    compiled = Compiled(text=backward, memory=memory, seconds=0.0, cpu_seconds=0.0)
    monkeypatch.setattr(job, "compile_step", lambda *_: compiled)
    monkeypatch.setattr(gpu_compile, "has_plugin", lambda: True)
    run = config.load(SMOKE, HALF)
    abstract = job.abstract_step_of(run, shapes_of(run)[0], 1)
    step = job.sharded_step_of(abstract, run, parse("h100:8"), real=False)
    step = dataclasses.replace(step, mesh=make_mesh(run, abstract.model, jax.devices()))
    assert job.measure(step, "default").memory.temporaries == 11 + needed


@pytest.mark.parametrize(("axes", "queries"), [({}, 2048), ({"context": 2}, 1024), ({"tensor": 2}, 2048)])
def test_arithmetic_counts_one_mask_and_the_memory_in_which_attention_works(axes, queries):
    run = config.load(SMOKE, [*HALF, "data.max_length=2048", "train.batch_size=1"])
    sizes = job.abstract_step_of(run, shapes_of(run)[0], 1).sizes
    gpu, tpu = (
        analytic.memory_of(run, sizes, analytic.cut_of(run, axes, kernel=kernel), 0) for kernel in (False, True)
    )
    (group,) = sizes.attention
    ways = axes.get("tensor", 1)
    works_in = gpu_compile.attention_workspace(
        queries, 2048, group.heads // ways, -(-group.kv_heads // ways), group.head_dim
    )
    assert gpu.temporaries - tpu.temporaries == 2 * queries * 2048 + works_in


@pytest.mark.slow
def test_layers_that_gather_weights_and_have_a_loop_are_compiled(tmp_path):
    if not gpu_compile.has_plugin():
        pytest.skip(NO_PLUGIN)
    # Matrices so large that the products of experts take three turns of a loop.
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 2048, "num_experts": 16, "num_experts_per_tok": 2}
    small = {"num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 64, "vocab_size": 1024}
    published = Path(jaxft.__file__).parent / "assets" / "published" / "qwen3-30b-a3b.json"
    fields = json.loads(published.read_text(encoding="utf-8")) | sizes | small
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    changes = [f"model.path={tmp_path}", "model.remat=dots", "train.batch_size=8", "data.max_length=512"]
    # In a process of its own, which a failed check of the compiler ends.
    plan = jaxft.plan(config.load(str(CONFIGS / "qwen3_30b_a3b_lora.py"), changes), "h100:8")
    assert plan["compiled"], plan["unknown"][0]


def test_attention_is_compiled_for_gpus_without_a_gradient_of_its_mask():
    if not gpu_compile.has_plugin():
        pytest.skip(NO_PLUGIN)
    mesh = jax.sharding.Mesh(gpu_compile.devices(parse("h100:1")), ("fsdp",))

    def loss(q, k, v, segments):
        return causal_attention(q, k, v, segments).astype(jnp.float32).sum()

    place = jax.NamedSharding(mesh, jax.P())
    shapes = [((2, 256, heads, 64), jnp.bfloat16) for heads in (8, 2, 2)] + [((2, 256), jnp.int32)]
    arguments = [jax.ShapeDtypeStruct(*shape, sharding=place) for shape in shapes]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arguments)
    module = hlo.parse(lowered.compile(compiler_options=gpu_compile.OPTIONS).as_text())
    assert gpu_compile.kernel_workspace(module) == gpu_compile.attention_workspace(512, 512, 8, 2, 64)
    everything = [call for computation in module.computations.values() for call in computation.instructions.values()]
    (backward,) = [call for call in everything if target_of(call) == gpu_compile.BACKWARD_ATTENTION]
    assert [array.dims for array in backward.arrays] == [(2, 8, 256, 64), (2, 2, 256, 64), (2, 2, 256, 64), (0,)]


def test_programs_for_gpus_are_traced_with_them_as_the_default_device(monkeypatch):
    defaults = []
    monkeypatch.setattr(jax, "default_device", lambda device: defaults.append(device) or contextlib.nullcontext())
    gpu, cpu = SimpleNamespace(platform="gpu"), jax.devices("cpu")[0]
    for device in (gpu, cpu):
        with traced_for(device):
            pass
    assert defaults == [gpu]


@pytest.mark.parametrize(("topology", "kernels"), [("h100:1", 3), ("a100-80:1", 0)])
def test_attention_by_tokamax_is_compiled_for_the_gpus_that_have_it(topology, kernels):
    if not gpu_compile.has_plugin():
        pytest.skip(NO_PLUGIN)
    if tokamax_module("tokamax") is None:
        pytest.skip("tokamax is not installed")
    (device,) = gpu_compile.devices(parse(topology))
    mesh = make_mesh_plan(MeshConfig(), [device])

    def step(q, batch):
        def loss(q, k, v):
            return causal_attention(q, k, v, batch["segments"]).astype(jnp.float32).sum()

        return q, jax.grad(loss, (0, 1, 2))(q, batch["k"], batch["k"])

    def shape(dims, dtype):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=mesh.batch_sharding())

    batch = {"k": shape((2, 512, 2, 64), jnp.bfloat16), "segments": shape((2, 512), jnp.int32)}
    compiled = compile_step(step, shape((2, 512, 8, 64), jnp.bfloat16), batch, mesh, "default", gpu_compile.OPTIONS)
    module = hlo.parse(compiled.text)
    everything = [call for computation in module.computations.values() for call in computation.instructions.values()]
    assert [target_of(call) for call in everything if "mosaic" in target_of(call)] == ["mosaic_gpu_v2"] * kernels
    masks = [array for call in everything for array in call.arrays if array.dims[-2:] == (512, 512)]
    assert bool(masks) == (kernels == 0)
    # The gradients of queries, and of keys and values, compute the scores anew, each for itself; cuDNN's do so once.
    products = (2 + 3 + 4 if kernels else 2 + 5) * 2 * 2 * 8 * 512 * 512 * 64 // 2
    costs = costs_of(module, {"fsdp": 1})
    assert costs.flops == products and not costs.unknown


def test_products_of_experts_by_tokamax_are_counted():
    if not gpu_compile.has_plugin():
        pytest.skip(NO_PLUGIN)
    if tokamax_module("tokamax") is None:
        pytest.skip("tokamax is not installed")
    mesh = make_mesh_plan(MeshConfig(), gpu_compile.devices(parse("h100:1")))
    rows, experts, inputs, outputs = 1024, 8, 256, 512

    def step(x, batch):
        def loss(x, kernel):
            return grouped(x, kernel, batch["sizes"]).astype(jnp.float32).sum()

        return x, jax.grad(loss, (0, 1))(x, batch["kernel"])

    def shape(dims, dtype):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=mesh.batch_sharding())

    batch = {"kernel": shape((experts, inputs, outputs), jnp.bfloat16), "sizes": shape((experts,), jnp.int32)}
    compiled = compile_step(step, shape((rows, inputs), jnp.bfloat16), batch, mesh, "default", gpu_compile.OPTIONS)
    costs = costs_of(hlo.parse(compiled.text), {"fsdp": 1})
    # The result is not needed, so that only both gradients are left.
    assert costs.flops == 2 * 2 * rows * inputs * outputs and not costs.unknown


def test_a_small_step_is_compiled_for_gpus():
    if not gpu_compile.has_plugin():
        pytest.skip(NO_PLUGIN)
    run = config.load(SMOKE, HALF)
    plan = planning.plan(run, parse("h100:4"), level="O1", prices=None, length=length_of(run))
    assert plan["compiled"] and plan["optimization_level"] == "default"
    assert plan["fits"] and plan["hbm_peak_bytes"] > plan["argument_bytes"]
    assert plan["hardware_flops_per_step"] > plan["model_flops_per_step"]
    assert plan["collective_bytes_by_axis"].keys() == {"fsdp"}
    assert not [line for line in plan["unknown"] if "counted as none" in line]
