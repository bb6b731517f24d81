"""GPUs that are not here: which can be compiled for, and, where the plugin is installed, a small step that is."""

import json
from pathlib import Path

import pytest

import jaxft
from jaxft import config
from jaxft.hardware import gpu_compile
from jaxft.hardware.chips import CHIPS
from jaxft.hardware.compile import TooLarge
from jaxft.hardware.topology import parse
from jaxft.planning import job
from jaxft.planning import process as planning
from jaxft.planning.shapes import length_of, shapes_of

CONFIGS = Path(__file__).parents[2] / "configs"
SMOKE = f"{CONFIGS / 'llama3_1_8b_lora.py'}:smoke"
NO_PLUGIN = "JAX's CUDA plugin is not installed: pip install 'jaxft[plan_gpu]'"
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
