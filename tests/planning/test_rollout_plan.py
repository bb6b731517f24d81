"""Plans of methods that sample: what is in memory while answers are sampled, how long each part takes, what fits."""

import importlib.util
import json
from pathlib import Path

import jax
import pytest
from rich.console import Console

import jaxft
from jaxft import config
from jaxft.errors import ConfigError
from jaxft.generation import engine
from jaxft.generation.settings import Sampling
from jaxft.hardware.topology import parse
from jaxft.methods import method_of
from jaxft.models import config_from_hf, random_model
from jaxft.planning import changes
from jaxft.planning import process as planning
from jaxft.planning.decoding import Decoding, decoding_of
from jaxft.planning.decoding_costs import measure_sampling
from jaxft.planning.job import abstract_step_of, sharded_step_of
from jaxft.planning.rollout import estimate_run
from jaxft.planning.shapes import length_of, shapes_of
from jaxft.planning.tables import print_plan
from jaxft.sharding.mesh import make_mesh_plan

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL, LARGE = (str(CONFIGS / f"{name}.py") for name in ("smollm2_135m_grpo", "llama3_1_8b_grpo"))
SIZES = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
FAMILIES = {
    "plain": {"model_type": "llama"},
    "shared heads": {"model_type": "llama", "num_key_value_heads": 2},
    # One layer of six sees everything, the others a window.
    "windows": {"model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window": 24, "sliding_window_pattern": 6},
}
MESHES = {"fsdp": {"fsdp": 8}, "tensor": {"data": 4, "fsdp": 1, "tensor": 2}, "both": {"fsdp": 4, "tensor": 2}}
ROLLOUT = {"rollout.slots": 16, "rollout.max_completion_length": 40, "data.max_length": 90, "train.batch_size": 48}


def plan_of(path, topology, overrides):
    # As texts, which is what a pasted option is.
    options = {"model.remat": "full", **overrides}
    run = config.load(path, [f"{field}={value}" for field, value in options.items()])
    return planning.plan(run, parse(topology), level="O1", prices=None, length=length_of(run, examples=10_000))


def decoding(run, hf_config, topology) -> Decoding:
    step = sharded_step_of(abstract_step_of(hf_config=hf_config, config=run, steps=100), run, parse(topology))
    return decoding_of(step, method_of(run).rollout_size(run))


def bytes_on_first_device(tree):
    first = jax.devices()[0]
    shards = (shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == first)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize(
    ("family", "mesh"),
    [("plain", "fsdp"), ("shared heads", "fsdp"), ("windows", "fsdp"), ("shared heads", "tensor"), ("windows", "both")],
)
def test_cache_and_copy_are_those_of_generation(family, mesh):
    hf_config = SIZES | FAMILIES[family]
    axes = {f"mesh.{axis}": size for axis, size in MESHES[mesh].items()}
    run = config.load(SMALL, ROLLOUT | axes | {"adapter.kind": "none"})
    planned = decoding(run, hf_config, "h100:8")

    model = random_model(config_from_hf(hf_config), seed=0)
    make_mesh_plan(run.mesh).shard_module(model)
    requests = [engine.Request(id=row, prompt=(1, 2, 3), sampling=Sampling()) for row in range(48)]
    real = engine.start(model, requests, stop_ids=(), slots=16, answers=8, length=90)

    assert len(real.slots) == planned.slots_of(run.rollout.slots) == 16
    assert (real.length, real.group) == (planned.length, planned.group(16)[0])
    assert planned.cache_bytes(16) == bytes_on_first_device(real.memory)
    assert planned.copied is (mesh != "tensor")
    assert planned.param_bytes == bytes_on_first_device(real.params)
    if family == "windows":
        windows = [part.slots for part in real.memory.cache]
        assert min(windows) == 24 and max(windows) == real.length  # the test has both


def test_the_cache_is_slots_times_length_times_heads():
    """By the formula of the page, for a model on eight devices whose heads the axis `tensor` splits."""
    run = config.load(LARGE)
    planned = decoding(run, shapes_of(run)[0], "h100:8")
    keys_and_values = 128 * 1024 * 32 * 2 * 8 * 128 * 2 / 8
    positions, seen = 128 * 1024 * 4, 128 * 128_256 / 8
    assert planned.cache_bytes(128) == keys_and_values + positions + seen
    assert planned.tensor == 8 and planned.copy_bytes == pytest.approx(8_030_261_248 * 2 / 8, rel=0.03)


@pytest.fixture(scope="module")
def decode_bound():
    return plan_of(LARGE, "h100:8", {"rollout.slots": 16})


@pytest.fixture(scope="module")
def update_bound():
    return plan_of(LARGE, "h100:8", {"rollout.slots": 128, "train.batch_size": 512})


def test_the_peak_is_the_larger_of_the_two_and_not_their_sum(decode_bound, update_bound):
    slots = {"rollout.slots": 2048, "rollout.steps_per_rollout": 4, "checkpoint.every": 64, "train.eval_every": 64}
    more = plan_of(LARGE, "h100:8", slots | {"train.batch_size": 512})
    for plan in (decode_bound, update_bound, more):
        assert plan["hbm_peak_bytes"] == max(plan["update_peak_bytes"], plan["rollout"]["hbm_peak_bytes"])
        rollout = plan["rollout"]
        parts = sum(rollout[f"{part}_bytes"] for part in ("state", "copy", "cache", "temp"))
        assert parts == rollout["hbm_peak_bytes"]
        assert rollout["state_bytes"] == plan["argument_bytes"] - plan["argument_parts"]["batch"]
    # Another number of slots does not touch the update.
    assert more["update_peak_bytes"] == update_bound["update_peak_bytes"]
    assert update_bound["hbm_peak_bytes"] == update_bound["update_peak_bytes"]
    assert more["hbm_peak_bytes"] == more["rollout"]["hbm_peak_bytes"] > update_bound["hbm_peak_bytes"]


def test_the_longest_part_is_named_and_the_hours_have_all_parts(decode_bound, update_bound):
    for plan, longest, said in ((decode_bound, "decode", "decoding"), (update_bound, "update", "updates")):
        rollout = plan["rollout"]
        assert rollout["longest_part"] == longest == max(rollout["seconds"], key=rollout["seconds"].get)
        assert plan["step_seconds"] == pytest.approx(sum(rollout["seconds"].values()))
        assert plan["hours"] == pytest.approx(plan["steps"] * plan["step_seconds"] / 3600)
        console = Console(record=True, width=150)
        print_plan(plan, console)
        (line,) = [line for line in console.export_text().splitlines() if "<- longest" in line]
        assert line.split()[0].startswith(said)
    assert decode_bound["rollout"]["decode_steps"] == 8 * 512  # eight turns of 16 slots
    assert update_bound["rollout"]["decode_steps"] == 4 * 512


def test_only_the_time_of_reward_functions_is_not_known(decode_bound):
    assert decode_bound["unknown"][1] == "the time of reward functions: none is in the hours"
    assert not [line for line in decode_bound["unknown"] if "sampling" in line or "cache" in line]
    assert any("512 tokens" in line for line in decode_bound["rollout"]["assumed"])
    assert json.loads(json.dumps(decode_bound))["rollout"] == decode_bound["rollout"]


def test_a_decoding_step_reads_the_weights_and_the_cache(decode_bound):
    rollout = decode_bound["rollout"]
    seconds = (rollout["copy_bytes"] + rollout["cache_bytes"]) / (3350e9 * 0.8)
    assert seconds < rollout["decode_step_seconds"] < 1.2 * seconds
    assert rollout["tokens_per_second"] == pytest.approx(16 / rollout["decode_step_seconds"])


ANSWERS = {"rollout.steps_per_rollout": 32, "checkpoint.every": 64, "train.eval_every": 64}


def test_the_slots_that_fit_do_and_more_do_not():
    most = plan_of(LARGE, "l4:8", ANSWERS)["rollout"]["slots_that_fit"]
    assert most % 8 == 0
    fits, over = (plan_of(LARGE, "l4:8", ANSWERS | {"rollout.slots": n})["rollout"] for n in (most, most + 8))
    assert fits["slots"] == most and fits["fits"]
    assert over["slots"] == most + 8 and not over["fits"]


def test_a_rollout_that_does_not_fit_lists_changes_that_do(monkeypatch):
    monkeypatch.setattr(changes, "SHOWN", 9)  # those that change what is learned are the last
    overrides = ANSWERS | {"rollout.slots": 1344}
    plan = plan_of(LARGE, "l4:8", overrides)
    assert not plan["fits"] and not plan["rollout"]["fits"]
    assert plan["update_peak_bytes"] < plan["hbm_limit_bytes"] < plan["hbm_peak_bytes"]
    by_field = {change["paste"].split("=")[0]: change for change in plan["changes"]}
    assert {"--config.rollout.slots", "--config.rollout.max_completion_length"} <= set(by_field), by_field
    for change in plan["changes"]:
        pasted = [option.removeprefix("--config.").split("=") for option in change["paste"].split()]
        topology = dict(pasted).pop("--topology", "l4:8")
        again = plan_of(LARGE, topology, overrides | {k: v for k, v in pasted if k != "--topology"})
        assert again["fits"] and again["hbm_peak_bytes"] == pytest.approx(change["hbm_peak_bytes"], abs=2)
        assert again["step_seconds"] == pytest.approx(change["step_seconds"])


def test_every_method_that_samples_has_a_rollout_and_others_have_none():
    own = {"method.name": "rloo", "rollout.num_iterations": 1}
    # The policy's own pass and the reference's.
    assert sizes(own).scoring_passes == 2
    assert sizes(own | {"method.rloo.beta": 0.0}).scoring_passes == 0
    assert sizes({"rollout.num_iterations": 2}).scoring_passes == 1
    assert sizes({"rollout.num_iterations": 2, "rollout.steps_per_rollout": 3}).updates == 6
    assert sizes({"method.name": "ppo"}).scoring_passes == 3
    pairs = sizes({"method.name": "online_dpo"})
    assert (pairs.answers, pairs.prompt_length) == (48, 384 // 2 - 40)
    distill = str(CONFIGS / "smollm2_135m_distill.py")
    assert sizes({}, distill) is None
    sampled = sizes({"method.distill.lmbda": 0.25, "method.distill.max_new_tokens": 99}, distill)
    assert (sampled.updates, sampled.max_completion_length) == (4, 99)
    assert sizes({}, str(CONFIGS / "quickstart.py")) is None


def sizes(overrides, path=SMALL):
    run = config.load(path, {"checkpoint.best_metric": None, "checkpoint.every": None} | overrides)
    return method_of(run).rollout_size(run)


def test_turns_keep_their_slots_and_their_replies_are_not_known():
    turns = {"rollout.environment": "calculator", "rollout.slots": 512}
    plan = plan_of(LARGE, "h100:8", turns)
    assert plan["rollout"]["slots"] == 512 > plan["rollout"]["answers"]
    assert any("replies of the environment" in line for line in plan["unknown"])


def test_steps_follow_from_the_number_of_prompts_and_not_of_tokens():
    run = config.load(LARGE, {"train.epochs": 2.0, "rollout.num_iterations": 2})
    # 16 prompts for each rollout, which serves two steps.
    assert length_of(run, examples=7473).steps == 935 * 2
    with pytest.raises(ConfigError, match=r"'grpo' has as many steps as its prompts need.*--examples, not --tokens"):
        length_of(run, tokens=10**6)
    smoke = config.load(f"{LARGE}:smoke", {"train.steps": None, "train.epochs": 2.0})
    size = method_of(smoke).rollout_size(smoke)
    assert length_of(smoke).steps == length_of(smoke, examples=24).steps == 2 * 24 // size.prompts


def test_passes_and_shared_rollouts_are_in_the_time(decode_bound):
    shared = plan_of(LARGE, "h100:8", {"rollout.slots": 16, "rollout.num_iterations": 2})
    first, second = decode_bound["rollout"]["seconds"], shared["rollout"]["seconds"]
    assert first["scoring"] == 0 < second["scoring"] < 0.5 * first["update"]
    assert second["decode"] == first["decode"] and second["update"] == pytest.approx(2 * first["update"])
    assert shared["step_seconds"] == pytest.approx(sum(second.values()) / 2)


def test_distillation_samples_in_a_share_of_its_steps():
    path = str(CONFIGS / "smollm2_135m_distill.py")
    hub = {"model.path": "hf://HuggingFaceTB/SmolLM2-135M-Instruct", "method.distill.lmbda": 0.5}
    plan = plan_of(path, "h100:1", hub | {"method.distill.max_new_tokens": 64})
    rollout = plan["rollout"]
    assert rollout["answers"] == 8 and rollout["copy_bytes"] == 0  # the weights of the state are those of generation
    assert plan["step_seconds"] == pytest.approx(sum(rollout["seconds"].values()) / 2)
    assert any("packed rows" in line for line in plan["unknown"])
    assert not any("reward functions" in line for line in plan["unknown"])


@pytest.fixture(scope="module")
def compiled():
    """The programs of generation of a small model, compiled for a slice."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu")
    overrides = {"model.dtype": "bfloat16", "mesh.fsdp": 4, "train.batch_size": 64, "rollout.slots": 64}
    return jaxft.plan(config.load(f"{LARGE}:smoke", overrides), "v5e:2x2")


def test_prefill_and_decode_are_compiled_for_a_slice(compiled):
    rollout = compiled["rollout"]
    assert compiled["compiled"] and rollout["compiled"] and rollout["fits"] and rollout["refused"] is None
    assert rollout["mesh"]["data"] * rollout["mesh"]["tensor"] == 4
    parts = sum(rollout[f"{part}_bytes"] for part in ("state", "copy", "cache", "temp"))
    # The compiler pads what it keeps to whole tiles.
    assert parts <= rollout["hbm_peak_bytes"] < 3 * parts
    assert not [line for line in compiled["unknown"] if "counted" in line and "block" not in line]


@pytest.fixture(scope="module")
def compiled_large():
    pytest.importorskip("libtpu")
    return jaxft.plan(config.load(LARGE), "v5e:2x4")["rollout"]


@pytest.mark.slow
def test_the_arithmetic_is_close_to_the_compiled_programs(compiled_large):
    run = config.load(LARGE, {"model.remat": "full"})
    step = sharded_step_of(abstract_step_of(run, shapes_of(run)[0], 100), run, parse("v5e:2x4"), real=False)
    estimate = estimate_run(step).rollout
    assert estimate.peak == pytest.approx(compiled_large["hbm_peak_bytes"], rel=0.02)
    # The compiled loop copies the keys in and out, and reads masks and scores.
    assert estimate.token_seconds < compiled_large["decode_step_seconds"] < 1.5 * estimate.token_seconds
    parts = sum(compiled_large[f"{part}_bytes"] for part in ("state", "copy", "cache", "temp"))
    assert parts == pytest.approx(compiled_large["hbm_peak_bytes"], rel=0.001)


@pytest.mark.slow
def test_the_slots_that_fit_do_by_the_compiler_too(compiled_large):
    run = config.load(LARGE, {"rollout.steps_per_rollout": 10})
    step = sharded_step_of(abstract_step_of(run, shapes_of(run)[0], 100), run, parse("v5e:2x4"))
    decoding, most = decoding_of(step, method_of(run).rollout_size(run)), compiled_large["slots_that_fit"]
    options = {"state": compiled_large["state_bytes"], "level": "O1"}
    limit = step.topology.chip.hbm_bytes
    for slots, fits in ((most, True), (most + most // 8, False)):
        sampling = measure_sampling(decoding, decoding.slots_of(slots), **options)
        assert (sampling.refused is None and sampling.memory.peak <= limit) is fits
