"""The cases of `gpu_check.py`: training and decoding of drawn models, measured in a process of their own.

Training is that of `jaxft train`: its set-up, its step, its feed and its loop. Only the weights are drawn, and nothing
is saved.
"""

# I inputs, O outputs

import json
import random
import statistics
import string
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jaxft
from jaxft import config as config_module
from jaxft import models
from jaxft.adapters.make import attach_adapter
from jaxft.assets import ASSETS
from jaxft.checkpoint.load import shardings_by_path
from jaxft.config import RunConfig
from jaxft.generation.settings import Sampling
from jaxft.generation.tokens import generate_tokens
from jaxft.hardware.attached import attached_topology
from jaxft.methods import method_of
from jaxft.nn.decoder import Decoder
from jaxft.nn.param_kind import kind_of
from jaxft.nn.quantized import use_matmul
from jaxft.optim.make import make_schedule
from jaxft.quant import FORMATS, is_quantized
from jaxft.runs.build import abstract_model, load_frozen, make_mesh, make_tx, start_state, with_frozen
from jaxft.runs.fitting import cadence_of, hooks_of, step_that_fits
from jaxft.runs.train import set_up
from jaxft.sharding.mesh import MeshPlan
from jaxft.training.goodput import PREFIX, TimeUse
from jaxft.training.log import NoLog
from jaxft.training.loop import fit
from jaxft.trees import flatten

STDDEV = 0.02
LENGTH, SMOKE_LENGTH = 4096, 64
STEPS, SMOKE_STEPS = 9, 3  # in three windows, of which the first holds the compilation and is left out
WORDS = 700, 40  # mean letters of a document, and of one in a smoke test
SMOKE_PLAN = "h100:1"  # what a plan is made for where there is no accelerator
SMOKE_SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 512, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}  # fmt: skip
Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one process measures.

    shape: a file of `jaxft/assets/published`, whose fields `sizes` changes. rows: sequences of a step; for decoding,
    rows at a time; smoke_rows: of a device in the smoke form. settings: of the config, by key. packings: values of
    `data.packing` that are measured one after the other, with the same compiled step. new_tokens: for decoding.
    """

    shape: str
    rows: int
    settings: Mapping[str, Any]
    sizes: Mapping[str, Any] = field(default_factory=dict)
    packings: tuple[bool, ...] = (True,)
    new_tokens: int = 0
    smoke_rows: int = 1


LORA = {"adapter.kind": "lora", "adapter.r": 16, "adapter.alpha": 32.0}
FULL = {"adapter.kind": "none"}
QLORA = {**LORA, "model.quantization": "nf4-dq"}
GRPO = {
    **LORA, "method.name": "grpo", "rollout.num_generations": 8, "rollout.slots": 64,
    "rewards.functions": f"{Path(__file__).parents[1] / 'configs/reward_functions/gsm8k.py'}:right_number",
}  # fmt: skip
CASES = {
    "lora": Case(shape="llama-3.1-8b", rows=2, settings=LORA, packings=(True, False)),
    "qlora": Case(shape="llama-3.1-8b", rows=2, settings=QLORA),
    "full": Case(shape="llama-3.2-1b", rows=4, settings=FULL),
    "lora_fp8": Case(shape="llama-3.1-8b", rows=2, smoke_rows=16, settings={**LORA, "train.matmul_dtype": "fp8"}),
    "dpo": Case(shape="llama-3.1-8b", rows=2, settings={**LORA, "method.name": "dpo"}),
    "decode": Case(shape="llama-3.1-8b", rows=64, settings=GRPO, new_tokens=256),
    "moe": Case(
        shape="qwen3-30b-a3b",
        rows=4,
        settings=FULL,
        sizes={"num_hidden_layers": 8, "num_experts": 32, "num_experts_per_tok": 4},
        packings=(True, False),
    ),
}


def run_case(name: str, folder: Path, emit: Emit, *, smoke: bool) -> None:
    """Measures a case in `folder`, and gives each result to `emit` as soon as it is there."""
    case = CASES[name]
    config = config_of(case, folder, smoke=smoke)
    topology = attached_topology(jax.devices()[:1]) or SMOKE_PLAN
    emit({"device": jax.devices()[0].device_kind, "jax": jax.__version__})
    planned = _in_background(partial(plan_of, config, topology))
    for result in (decoded if case.new_tokens else trained)(case, config):
        emit({"measured": result})
    emit({"plan": planned()})


def config_of(case: Case, folder: Path, *, smoke: bool) -> RunConfig:
    """The config of a case, whose model and rows are written to `folder`."""
    length = SMOKE_LENGTH if smoke else LENGTH
    rows = case.smoke_rows * jax.device_count() if smoke else case.rows
    values: dict[str, Any] = {
        "output_dir": str(folder / "run"), "model.path": str(write_model(case, folder / "model", smoke=smoke)),
        "model.random_init": True, "model.dtype": "float32" if smoke else "bfloat16",
        "model.param_dtype": "float32" if smoke else "bfloat16", "model.remat": "auto", "optim.schedule": "constant",
        "data.train": str(folder / "rows.jsonl"), "data.max_length": length, "data.truncation": "drop",
        "train.batch_size": rows, "train.steps": SMOKE_STEPS if smoke else STEPS,
        "train.log_every": (SMOKE_STEPS if smoke else STEPS) // 3, "eval.metric": None, "mesh.fsdp": -1,
        **case.settings,
    }  # fmt: skip
    if values.get("method.name") != "dpo":
        values["data.format"] = "text"
    if case.new_tokens:
        values |= {"data.format": "auto", "rollout.max_completion_length": _new_tokens(case, smoke=smoke)}
        values |= {"train.batch_size": 8 if smoke else case.rows, "rollout.slots": 8 if smoke else case.rows}
        values |= {"data.max_length": 2 * _new_tokens(case, smoke=smoke)}
    config = config_module.default_config()
    config.update_from_flattened_dict(values)
    write_rows(folder / "rows.jsonl", values.get("method.name", "sft"), length, rows * values["train.steps"])
    return config_module.resolve(config)


def write_model(case: Case, folder: Path, *, smoke: bool) -> Path:
    """A folder with config.json and the tokenizer of bytes, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = json.loads((ASSETS / "published" / f"{case.shape}.json").read_text(encoding="utf-8"))
    shape |= case.sizes
    if smoke:
        shape |= {name: size for name, size in SMOKE_SIZES.items() if name in shape or name == "head_dim"}
    # The tokenizer has other special tokens than the model of that shape.
    shape |= {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None}
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).write_bytes((ASSETS / "smoke" / file).read_bytes())
    return folder


def write_rows(path: Path, method: str, length: int, count: int) -> None:
    """`count` times two rows of random letters, of unequal lengths, that fit into `length` tokens."""
    draws, mean = random.Random(0), WORDS[length == SMOKE_LENGTH]

    def text(share: float = 1.0) -> str:
        size = min(draws.expovariate(1 / mean) + 8, length - 16)
        return "".join(draws.choices(string.ascii_lowercase + " ", k=max(1, int(size * share))))

    def row() -> dict[str, str]:
        if method == "sft":
            return {"text": text()}
        return {"prompt": text(0.1), "chosen": text(0.2), "rejected": text(0.2)}

    # Packed rows hold several of them.
    many = count * (1 + length // mean)
    path.write_text("".join(json.dumps(row()) + "\n" for _ in range(many)), encoding="utf-8")


def plan_of(config: RunConfig, topology: str) -> dict[str, Any]:
    """What `jaxft plan` says, in the terms of what is measured."""
    plan = jaxft.plan(config, topology)
    if (rollout := plan["rollout"]) is not None:
        return {
            "tokens_per_second": rollout["tokens_per_second"], "step_seconds": rollout["decode_step_seconds"],
            "peak_bytes": rollout["hbm_peak_bytes"], "topology": topology,
        }  # fmt: skip
    return {
        "tokens_per_second": plan["tokens_per_second_per_chip"] * plan["chips"], "step_seconds": plan["step_seconds"],
        "peak_bytes": plan["hbm_peak_bytes"], "mfu": plan["mfu"], "remat": plan["remat"],
        "flops_per_token": plan["model_flops_per_step"] / (plan["batch_size"] * plan["max_length"]),
        "topology": topology,
    }  # fmt: skip


def trained(case: Case, config: RunConfig) -> Iterator[dict[str, Any]]:
    """Tokens per second, seconds of a step, peak memory, host wait and seconds of compiling, for each packing."""
    state: Any = None
    for packing in case.packings:
        packed = replace(config, data=replace(config.data, packing=packing))
        run = replace(set_up(replace(packed, output_dir=f"{config.output_dir}-{packing}")), times=TimeUse())
        method = method_of(run.config)
        if state is None:
            module = drawn_model(run.config, run.mesh)
            run = method.precompute(run, lambda module=module: module)
            schedule = make_schedule(run.config.optim, run.total_steps)
            tx = make_tx(run.config, module, schedule)
            state = start_state(run.config, module, tx, run.mesh)[1]
            state = with_frozen(state, load_frozen(run.config, run.mesh, module))
            graphdef, step, choice = step_that_fits(run, module, tx, schedule, state)
            del module
        hooks = hooks_of(run, graphdef, method.feed(run, graphdef), step, save=lambda *_: None)
        log = Rows()
        state, _ = fit(state, hooks, cadence_of(run), log, start=0, progress={})
        policy = None if choice is None else choice.policy
        yield {"packed": packing, "remat": policy, **figures_of(log.logged), "peak_bytes": peak_bytes()}


class Rows(NoLog):
    """A log that keeps its rows."""

    def __init__(self) -> None:
        self.logged: list[Mapping[str, float]] = []

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.logged.append(dict(metrics))


def figures_of(rows: list[Mapping[str, float]]) -> dict[str, float]:
    """The speed of the windows after the first, from what the loop logs. host_wait: a share of their time."""
    later, first, last = rows[1:], rows[0], rows[-1]
    parts = {part: last[PREFIX + part] - first[PREFIX + part] for part in ("input", "steps")}
    return {
        "tokens_per_second": statistics.mean(row["tokens_per_second"] for row in later),
        "step_seconds": statistics.mean(row["step_seconds"] for row in later),
        "host_wait": parts["input"] / (parts["input"] + parts["steps"]),
        "compile_seconds": first[PREFIX + "compile"],
        "loss": last["loss"],
    }


def decoded(case: Case, config: RunConfig) -> Iterator[dict[str, Any]]:
    """Tokens per second and seconds of a decoding step of all rows, without the prompts, and peak memory."""
    size = config.rollout.max_completion_length
    mesh = make_mesh(config, abstract_model(config), jax.devices())
    model, draws = drawn_model(config, mesh), random.Random(0)
    prompts = [[draws.randrange(3, 256) for _ in range(size)] for _ in range(config.rollout.slots)]

    def seconds(new_tokens: int) -> float:
        started = time.perf_counter()
        sampling = Sampling(max_new_tokens=new_tokens, temperature=1.0)
        answers = generate_tokens(model, prompts, sampling=sampling, slots=len(prompts), length=2 * size)
        assert all(len(answer.tokens) == new_tokens for answer in answers)
        return time.perf_counter() - started

    compiled = seconds(size)
    first, whole = (min(seconds(count) for _ in range(2)) for count in (1, size))
    step = max(whole - first, 1e-6) / (size - 1)  # in a smoke test the clock tells them apart no more
    yield {
        "tokens_per_second": len(prompts) / step, "step_seconds": step, "prefill_seconds": first,
        "compile_seconds": compiled - whole, "peak_bytes": peak_bytes(),
    }  # fmt: skip


def drawn_model(config: RunConfig, mesh: MeshPlan) -> Decoder:
    """The model of a config on the mesh, drawn a layer at a time, so that no more than it is ever in memory."""
    hf_config = json.loads(Path(config.model.path, "config.json").read_text(encoding="utf-8"))
    storage = "float32" if config.adapter.kind == "none" else config.model.param_dtype
    options = {"dtype": config.model.dtype, "param_dtype": storage, "quantization": config.model.quantization}
    model = models.abstract_model(models.config_from_hf(hf_config), **options)
    graphdef, state = nnx.split(model)
    leaves, treedef = flatten(state, is_quantized)
    shardings, key = shardings_by_path(model, mesh), jax.random.key(config.seed)
    arrays = []
    for number, (path, leaf) in enumerate(leaves.items()):
        draw = partial(drawn, path, leaf, config.model.quantization)
        arrays.append(jax.jit(draw, out_shardings=shardings[path])(jax.random.fold_in(key, number)))
    module = nnx.merge(graphdef, jax.tree.unflatten(treedef, arrays))
    attach_adapter(module, config.adapter, config.seed)
    use_matmul(module, config.train.matmul_dtype)
    mesh.shard_module(module)
    return module


def drawn(path: str, leaf: Any, quantization: str | None, key: jax.Array) -> Any:
    """A parameter: ones for a vector, such as a norm's; else normal numbers, quantised if the leaf is."""
    if not kind_of(path, leaf.ndim).matrix:
        return jnp.ones(leaf.shape, leaf.dtype)

    def draw(shape: tuple[int, ...], key: jax.Array) -> Any:
        if len(shape) > 2:
            return jax.lax.map(partial(draw, shape[1:]), jax.random.split(key, shape[0]))
        values = STDDEV * jax.random.normal(key, shape, jnp.bfloat16 if is_quantized(leaf) else leaf.dtype)
        return FORMATS[quantization].quantize(values) if is_quantized(leaf) and quantization else values

    return draw(leaf.shape, key)


def peak_bytes() -> int | None:
    """The most memory of the first device that this process has had in use; None for CPUs."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _new_tokens(case: Case, *, smoke: bool) -> int:
    return 8 if smoke else case.new_tokens


def _in_background(function: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """Begins a call in a thread. What it returns waits for the result, or gives the error as `{"error": ...}`."""
    answer: dict[str, Any] = {}

    def work() -> None:
        try:
            answer.update(function())
        except Exception as error:
            answer["error"] = str(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def wait() -> dict[str, Any]:
        thread.join()
        return answer

    return wait
