"""GRPO of a LoRA adapter: jaxft and TRL take turns at the same prompts; prints the ratios of speed and peak memory.

    python benchmarks/grpo_vs_trl.py --model=runs/models/SmolLM2-135M-Instruct

The prompts are those of configs/smollm2_135m_grpo.py, and the reward is its reward. Both sides train rank 16 on all
linear layers in float32 with AdamW and the loss `dapo`, sample at temperature 1, and take as many answers in a step.
Seconds are those of a whole step: sampling, rewards and update. The first step compiles and does not count. Answers
differ, so the rate counts sampled tokens. TRL generates by transformers, as it does without vLLM.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from turns import measure

from jaxft.assets import ASSETS

ROOT = Path(__file__).parents[1]
PEOPLE, REWARD = ASSETS / "people" / "train.jsonl", ROOT / "configs" / "reward_functions" / "json_fields.py"
RATE = 3e-4


def run_jaxft(arguments: argparse.Namespace) -> tuple[list[float], list[float], list[float]]:
    """(seconds, sampled tokens, mean reward) of every step."""
    import jax

    from jaxft.config import load
    from jaxft.data import tokenizer_of
    from jaxft.methods import method_of
    from jaxft.methods.method import Run
    from jaxft.optim.make import make_schedule
    from jaxft.runs.build import abstract_model, build_model, make_mesh, make_step, make_tx, start_state

    config = load(
        str(ROOT / "configs" / "smollm2_135m_grpo.py"),
        {
            "model.path": arguments.model, "train.batch_size": arguments.answers, "data.eval": None,
            "data.eval_limit": None, "eval.metric": None, "eval.limit": None, "optim.learning_rate": RATE,
            "rollout.num_generations": arguments.group, "rollout.slots": arguments.slots,
            "rollout.max_completion_length": arguments.length, "rollout.log_completions": False,
        },
    )  # fmt: skip
    tokenizer, method, model = tokenizer_of(config), method_of(config), abstract_model(config)
    data = method.prepare(config, tokenizer)
    mesh, schedule = make_mesh(config, model, jax.devices()[:1]), make_schedule(config.optim, 100)
    module = build_model(config).module
    tx = make_tx(config, module, schedule)
    graphdef, state = start_state(config, module, tx, mesh)
    step = jax.jit(mesh.bind(make_step(config, model, graphdef, tx, schedule)), donate_argnums=0)
    seconds, tokens, rewards = [], [], []
    with method.rewards(config, data) as functions:
        run = Run(
            config=config, folder=Path(), tokenizer=tokenizer, data=data, mesh=mesh, model=model,
            source=method.source(config, data, tokenizer), rewards=functions,
        )  # fmt: skip
        feed = method.feed(run, graphdef)
        for number in range(arguments.steps + 1):
            began = time.perf_counter()
            state, metrics = step(state, feed(state, number))
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - began)
            logged = feed.metrics(number)
            tokens.append(logged["completions/mean_length"] * arguments.answers)
            rewards.append(logged["reward"])
    return seconds, tokens, rewards


def run_trl(arguments: argparse.Namespace) -> tuple[list[float], list[float], list[float]]:
    """(seconds, sampled tokens, mean reward) of every step."""
    import sys

    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    sys.path.insert(0, str(REWARD.parent))
    from json_fields import fields

    seconds: list[float] = []
    tokens: list[float] = []
    rewards: list[float] = []

    def reward(completions: list[Any], reference: list[str], **_: Any) -> list[float]:
        return fields([one[0]["content"] for one in completions], reference)

    class Clock(TrainerCallback):
        began = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "reward" in logs:
                now = time.perf_counter()
                seconds.append(now - self.began)
                self.began = now
                tokens.append(float(logs["completions/mean_length"]) * arguments.answers)
                rewards.append(float(logs["reward"]))

    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=arguments.answers, num_generations=arguments.group,
            max_completion_length=arguments.length, temperature=1.0, loss_type="dapo", beta=0.0,
            max_steps=arguments.steps + 1, learning_rate=RATE, lr_scheduler_type="constant", logging_steps=1,
            save_strategy="no", report_to=[], bf16=False, use_cpu=True, seed=0, disable_tqdm=True, weight_decay=0.0,
            gradient_checkpointing=arguments.checkpointing == "on",
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32),
            reward_funcs=reward,
            args=settings,
            train_dataset=load_dataset("json", data_files=str(PEOPLE), split="train"),
            processing_class=AutoTokenizer.from_pretrained(arguments.model),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
            callbacks=[Clock()],
        )
        trainer.train()
    return seconds, tokens, rewards


def main() -> None:
    """Measures both sides in turn, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--answers", type=int, default=48, help="answers in a step")
    parser.add_argument("--group", type=int, default=8, help="answers to a prompt")
    parser.add_argument("--length", type=int, default=40, help="most tokens of an answer")
    parser.add_argument("--slots", type=int, default=48)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--checkpointing", choices=("on", "off"), default="on")
    parser.add_argument("--only", choices=("jaxft", "trl"))
    arguments = parser.parse_args()
    if arguments.only:
        seconds, tokens, rewards = (run_jaxft if arguments.only == "jaxft" else run_trl)(arguments)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        measured = {"seconds": seconds, "tokens": tokens, "rewards": rewards, "peak_bytes": peak}
        print(json.dumps(measured))
        return
    results: dict[str, list[dict[str, Any]]] = {"jaxft": [], "trl": []}
    for _ in range(arguments.rounds):
        for who, each in results.items():
            each.append(one := measure(__file__, arguments, who))
            step, tokens = statistics.mean(one["seconds"][1:]), statistics.mean(one["tokens"][1:])
            print(
                f"{who:6} {step:6.1f} s a step, {tokens:5.0f} tokens sampled, {tokens / step:6.1f} tokens/s, "
                f"{one['peak_bytes'] / 1e9:.2f} GB, reward {one['rewards'][0]:.3f} to {one['rewards'][-1]:.3f}",
                flush=True,
            )
    rate = {
        who: statistics.median(sum(one["tokens"][1:]) / sum(one["seconds"][1:]) for one in each)
        for who, each in results.items()
    }
    peak = {who: max(one["peak_bytes"] for one in each) for who, each in results.items()}
    print(
        f"jaxft / TRL: {rate['jaxft'] / rate['trl']:.2f} times the rate, {peak['jaxft'] / peak['trl']:.2f} the memory"
    )


if __name__ == "__main__":
    main()
