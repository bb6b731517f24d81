"""Plans end to end: by arithmetic for GPUs, by the compiler for a TPU slice, and refusals."""

import dataclasses
import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

import jaxft
from jaxft import cli, config
from jaxft.errors import ConfigError
from jaxft.hardware.topology import parse
from jaxft.planning import process as planning
from jaxft.planning import search as plan_search
from jaxft.planning.shapes import length_of, published, shapes_of
from jaxft.planning.tables import print_plan

ROOT = Path(__file__).parents[2]
FULL, LORA = (str(ROOT / "configs" / f"llama3_1_8b_{kind}.py") for kind in ("full", "lora"))


def plan_of(run, topology, **options):
    length = length_of(run, tokens=options.pop("tokens", None), examples=options.pop("examples", None))
    return planning.plan(run, parse(topology), level="O1", prices=None, length=length, **options)


def test_a_gpu_is_planned_by_arithmetic():
    plan = plan_of(config.load(FULL), "h100:8", tokens=100_000_000)
    assert plan["fits"] and not plan["compiled"] and plan["optimization_level"] is None
    parts, states = plan["argument_parts"], 8_030_261_248 * 4 / 8
    assert parts["weights"] == states and parts["optimizer"] == pytest.approx(2 * states, rel=1e-6)
    assert plan["argument_bytes"] == sum(parts.values())
    assert plan["steps"] == math.ceil(100_000_000 / 4096 / 0.97 / 16) and plan["steps_known"]
    assert plan["hours"] == pytest.approx(plan["steps"] * plan["step_seconds"] / 3600)
    assert plan["usd"] == pytest.approx(plan["hours"] * 8 * plan["usd_per_chip_hour"])
    assert 0.2 < plan["mfu"] < 0.75
    assert "ship with jaxft" in plan["shapes_from"]
    assert any("by arithmetic" in line for line in plan["unknown"])


def test_an_adapter_leaves_the_base_without_moments():
    plan = plan_of(config.load(LORA), "h100:8")
    parts = plan["argument_parts"]
    assert parts["weights"] == 8_030_261_248 * 2 / 8
    assert parts["adapters"] == 41_943_040 * 4 / 8 and parts["optimizer"] == pytest.approx(
        2 * parts["adapters"], rel=0.01
    )
    assert plan["steps"] == 1000 and not plan["steps_known"] and "--tokens" in plan["steps_from"]


def test_products_of_8_bits_are_counted_at_their_peak():
    plain, narrow = (plan_of(config.load(LORA, ["model.remat=full", f"train.matmul_dtype={dtype}"]), "h100:8")
                     for dtype in (None, "fp8"))  # fmt: skip
    assert narrow["hardware_flops_per_step"] == plain["hardware_flops_per_step"]
    # Adapters, attention and the vocabulary keep their products.
    assert 0.5 < narrow["step_parts"]["products"] / plain["step_parts"]["products"] < 0.65
    assert narrow["hbm_traffic_bytes_per_step"] > plain["hbm_traffic_bytes_per_step"]
    assert narrow["hbm_peak_bytes"] > plain["hbm_peak_bytes"]
    with pytest.raises(ConfigError, match="a100-80 is not known"):
        plan_of(config.load(LORA, ["train.matmul_dtype=fp8"]), "a100-80:8")
    for changes, message in (
        (["mesh.tensor=2"], "mesh.tensor=2: the axis would split"),
        (["data.max_length=512", "train.batch_size=8"], "each device has 512 tokens at a time"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan_of(config.load(LORA, ["train.matmul_dtype=fp8", *changes]), "h100:8")


def test_auto_takes_the_cheapest_policy_that_fits():
    kept = {}
    for topology, policy in (("h100:8", "none"), ("l4:8", "attention"), ("l4:2", "offload")):
        plan = kept[topology] = plan_of(config.load(LORA), topology)
        assert plan["fits"] and plan["remat"] == policy and f"takes '{policy}'" in plan["remat_choice"]
        named = plan_of(config.load(LORA, [f"model.remat={policy}"]), topology)
        assert named["remat_choice"] is None
        for key in ("hbm_peak_bytes", "step_seconds"):
            assert named[key] == plan[key]
    assert kept["h100:8"]["hardware_flops_per_step"] < 1.15 * kept["h100:8"]["model_flops_per_step"]


def test_a_policy_that_the_compiler_refuses_is_followed_by_the_next(monkeypatch):
    tried = []

    def measure(step, level):
        tried.append(step.config.model.remat)
        known = plan_search.estimate_run(step)
        refused = "RESOURCE_EXHAUSTED" if len(tried) < 3 else None
        return dataclasses.replace(known, update=dataclasses.replace(known.update, refused=refused))

    monkeypatch.setattr(planning, "measure_run", measure)
    plan = plan_of(config.load(LORA), "h100:8")
    assert tried == ["none", "dots", "attention"] and plan["remat"] == "attention" and plan["fits"]
    assert "the compiler refused 'dots'" in plan["remat_choice"]


def test_a_plan_that_does_not_fit_lists_changes():
    plan = plan_of(config.load(FULL), "h100:1")
    assert not plan["fits"]
    assert plan["changes"] and all(c["hbm_peak_bytes"] < plan["hbm_limit_bytes"] for c in plan["changes"])
    assert plan["changes"][0]["paste"].startswith("--topology=h100:")
    assert "adapter.kind=lora" in plan["changes"][-1]["paste"]  # a change that alters what is learned comes last


def pasted(path, topology, overrides, change):
    """The config and the topology of a command with the options of a change added."""
    options = change["paste"].split()
    topologies = [option.removeprefix("--topology=") for option in options if option.startswith("--topology=")]
    more = [option.removeprefix("--config.") for option in options if option.startswith("--config.")]
    return config.load(path, [*overrides, *more]), topologies[0] if topologies else topology


NOT_FITTING = {
    "full": (FULL, "h100:1", []),
    "adapters": (LORA, "l4:2", ["model.remat=full"]),
    "whatever fits": (LORA, "l4:1", []),
    "everything kept": (LORA, "l4:4", ["model.remat=dots"]),
    "long rows": (LORA, "l4:4", ["data.max_length=65536", "train.batch_size=4"]),
}


@pytest.mark.parametrize("case", NOT_FITTING)
def test_a_pasted_change_fits_and_gives_the_numbers_it_promised(case):
    path, topology, overrides = NOT_FITTING[case]
    plan = plan_of(config.load(path, overrides), topology)
    assert not plan["fits"] and plan["changes"]
    for change in plan["changes"]:
        again = plan_of(*pasted(path, topology, overrides, change))
        assert again["fits"] and again["hbm_peak_bytes"] == pytest.approx(change["hbm_peak_bytes"], abs=2)
        assert again["step_seconds"] == pytest.approx(change["step_seconds"])
    kinds = [re.sub(r"\d+", "N", change["what"]) for change in plan["changes"]]
    assert len(set(kinds)) == len(kinds)
    if case == "long rows":
        assert any("mesh.context=" in change["paste"] for change in plan["changes"])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_changes_fit_by_the_compiler_too():
    path, topology = str(ROOT / "configs" / "smollm2_135m_lora.py"), "v5e:1x1"
    overrides = ["model.path=hf://HuggingFaceTB/SmolLM2-135M-Instruct", "model.dtype=bfloat16", "model.remat=dots"]
    overrides += ["train.batch_size=256", "data.max_length=4096"]
    plan = jaxft.plan(config.load(path, overrides), topology)
    assert not plan["fits"] and plan["changes"]
    for change in (plan["changes"][0], plan["changes"][-1]):
        run, changed = pasted(path, topology, overrides, change)
        again = jaxft.plan(run, changed)
        assert again["compiled"] and again["fits"], change


def test_a_search_gives_overrides_that_lead_to_its_plan():
    run = config.load(LORA)
    length = length_of(run, tokens=10_000_000)
    result = planning.search(run, "h100,rtx4090", 1, compiles=1, level="O1", prices=None, length=length)
    assert 0 < result["fitting"] < result["tried"]
    cheapest, fastest = result["cheapest"], result["fastest"]
    assert fastest["step_seconds"] <= cheapest["step_seconds"] and cheapest["usd"] <= fastest["usd"]
    assert fastest["topology"] == "h100:8"
    pasted = [part.removeprefix("--config.") for part in fastest["overrides"].split()]
    again = plan_of(config.load(LORA, pasted), fastest["topology"])
    assert again["hbm_peak_bytes"] == fastest["hbm_peak_bytes"]
    with pytest.raises(ConfigError, match="none of .* ways to run this on l4:1 fits"):
        planning.search(config.load(FULL), "l4:1", 1, compiles=1, level="O1", prices=None, length=length)


def test_steps_come_from_the_config_the_options_or_the_data(tmp_path):
    run = config.load(LORA)
    with_steps = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=7))
    assert length_of(with_steps).steps == 7
    assert length_of(run, examples=160).steps == 10
    smoke = config.load(f"{LORA}:smoke", {"train.steps": None})
    assert length_of(smoke).known and smoke.data.train in length_of(smoke).source
    unpacked = dataclasses.replace(run, data=dataclasses.replace(run.data, packing=False))
    with pytest.raises(ConfigError, match="packing=False.*--examples"):
        length_of(unpacked, tokens=1000)
    with pytest.raises(ConfigError, match="at least 1"):
        length_of(run, tokens=0)


def test_every_published_shape_is_named_and_understood():
    names = published()
    files = {path.stem for path in (ROOT / "jaxft" / "assets" / "published").glob("*.json")}
    assert set(names.values()) == files
    hf_config, source = shapes_of(config.load(FULL, {"model.path": "hf://Qwen/qwen3-8b@main"}))
    assert hf_config["model_type"] == "qwen3" and "Qwen/Qwen3-8B" in source
    with pytest.raises(ConfigError, match="Did you mean 'meta-llama/Llama-3.1-8B'"):
        shapes_of(config.load(FULL, {"model.path": "hf://meta-llama/Lama-3.1-8B"}))


def test_prices_that_cannot_be_read_are_refused_before_anything_is_planned(monkeypatch):
    monkeypatch.setattr(planning, "abstract_step_of", None)
    with pytest.raises(ConfigError, match=r"prices in none\.json cannot be read"):
        length = length_of(config.load(LORA), examples=16)
        planning.plan(config.load(LORA), parse("h100:8"), level="O1", prices="none.json", length=length)


# One compile for all tests: rows split over the context axis, inputs of each layer in the host's memory.
OPTIONS = {"model.dtype": "bfloat16", "model.remat": "offload", "mesh.fsdp": 2, "mesh.context": 2}


@pytest.fixture(scope="module")
def compiled():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu")
    return jaxft.plan(config.load(f"{FULL}:smoke", OPTIONS), "v5e:2x2")


def test_a_tpu_slice_is_compiled_for(compiled):
    plan = compiled
    assert plan["compiled"] and plan["fits"] and plan["refused"] is None
    assert plan["mesh"]["fsdp"] == plan["mesh"]["context"] == 2 and plan["optimization_level"] == "O1"
    # The compiler's arguments are the parts that the shardings give, and a little padding.
    parts = sum(plan["argument_parts"].values())
    assert parts <= plan["argument_bytes"] < 1.5 * parts + 2**16
    peak = plan["argument_bytes"] + plan["output_bytes"] - plan["aliased_bytes"] + plan["temp_bytes"]
    assert plan["hbm_peak_bytes"] == peak + plan["code_bytes"]
    # Every parameter multiplies every token thrice; the layers' forward products are computed once more.
    assert plan["hardware_flops_per_step"] > plan["model_flops_per_step"] > 0
    assert set(plan["collective_bytes_by_axis"]) == {"fsdp", "context", "fsdp+context"}
    assert not [line for line in plan["unknown"] if "counted" in line and "block" not in line]


def test_what_enters_each_layer_goes_to_the_host_and_comes_back(compiled):
    run = config.load(f"{FULL}:smoke", OPTIONS)
    sizes, tokens = shapes_of(run)[0], run.train.batch_size * run.data.max_length // 4
    kept = sizes["num_hidden_layers"] * tokens * sizes["hidden_size"] * 2
    assert compiled["host_traffic_bytes_per_step"] == 2 * kept
    assert kept <= compiled["host_bytes"] < 2.1 * kept  # in whole tiles, which may be half full
    assert any("host's memory" in line for line in compiled["unknown"])


def test_every_key_is_explained(compiled):
    explained = set(re.findall(r"^\| `(\w+)`", (ROOT / "docs" / "plan.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(compiled) <= explained
    assert explained - set(compiled) <= {"changes", "overrides"}


def test_the_command_gives_json_and_refuses(capsys):
    assert cli.main(["plan", f"--config={LORA}", "--topology=h100:8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chips"] == 8
    # The process of its own passes its refusals on.
    assert cli.main(["plan", f"--config={FULL}", "--topology=h100:8", "--config.train.batch_size=12"]) == 2
    assert "are not divisible by 8 devices" in capsys.readouterr().err


def test_tables_show_what_is_known_and_what_is_not():
    console = Console(record=True, width=120)
    print_plan(plan_of(config.load(FULL), "h100:1"), console)
    shown = console.export_text()
    for part in ("does not fit", "optimizer", "USD", "1,000 steps", "--topology=h100:2", "s a step", "not known"):
        assert part in shown


def test_a_search_goes_on_until_one_fits(monkeypatch):
    """The compiler refuses every candidate with an estimate above half of the memory: the next smaller one is tried."""
    peaks = []

    def measure(step, level):
        known = plan_search.estimate_run(step)
        peaks.append(known.peak)
        big = known.peak > 0.5 * step.topology.chip.hbm_bytes
        update = dataclasses.replace(known.update, refused="RESOURCE_EXHAUSTED" if big else None)
        return dataclasses.replace(known, update=update)

    monkeypatch.setattr(plan_search, "measure_run", measure)
    run = config.load(LORA)
    result = planning.search(run, "h100", 1, compiles=20, level="O1", prices=None, length=length_of(run))
    assert result["cheapest"]["fits"] and result["fastest"]["fits"]
    assert peaks[1] <= 0.9 * peaks[0]  # a candidate that needs hardly less is skipped
    one = planning.search(run, "h100:1", 1, compiles=0, level="O1", prices=None, length=length_of(run))
    assert one["cheapest"] is None and one["candidates"]
