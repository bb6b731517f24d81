"""DPO of a LoRA adapter: jaxft and TRL take turns at the same pairs; prints the ratios of rate and peak memory.

    python benchmarks/dpo_vs_trl.py --model=runs/models/SmolLM2-135M-Instruct --pairs=pairs.jsonl

pairs: rows of prompt, chosen and rejected. Both sides train rank 16 on all linear layers in float32 with AdamW, beta
0.1, the base without its adapter as the reference, and as many pairs in a step. jaxft packs the pairs of a step into
rows of --length tokens; TRL pads them to the longest, as its trainer does by default. The rate counts tokens of
prompts and answers, not padding. TRL recomputes activations by default (--checkpointing=off keeps them). Each
measurement is a process of its own, so that its peak memory is too, and the ratio is that of the medians.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from typing import Any

from turns import measure

ADAPTER = {"r": 16, "alpha": 32.0}
BETA, RATE = 0.1, 2e-4


def run_jaxft(arguments: argparse.Namespace) -> tuple[list[float], list[float], list[float]]:
    """(seconds, tokens, loss) of every step."""
    import jax

    from jaxft.config import load
    from jaxft.data import tokenizer_of
    from jaxft.methods import method_of
    from jaxft.optim.make import make_schedule
    from jaxft.runs.build import abstract_model, build_model, make_step, make_tx, start_state

    settings = {
        "model.path": arguments.model, "model.dtype": "float32", "method.name": "dpo", "method.dpo.beta": BETA,
        "adapter.r": ADAPTER["r"], "adapter.alpha": ADAPTER["alpha"], "adapter.dropout": 0.0,
        "data.train": arguments.pairs, "data.eval": None, "data.max_length": arguments.length, "eval.metric": None,
        "data.shuffle": False, "data.limit": None, "train.batch_size": arguments.rows, "optim.learning_rate": RATE,
        "optim.schedule": "constant", "optim.warmup_ratio": 0.0, "checkpoint.best_metric": None,
        "optim.min_ratio": 0.0, "model.remat": arguments.remat,
    }  # fmt: skip
    config = load("configs/smollm2_135m_lora.py", settings)
    tokenizer, method, model = tokenizer_of(config), method_of(config), abstract_model(config)
    source = method.source(config, method.prepare(config, tokenizer), tokenizer)
    module, schedule = build_model(config).module, make_schedule(config.optim, 100)
    tx = make_tx(config, module, schedule)
    graphdef, state = start_state(config, module, tx)
    step = jax.jit(make_step(config, model, graphdef, tx, schedule), donate_argnums=0)
    seconds, tokens, losses = [], [], []
    for number in range(arguments.steps + 1):
        batch = source.batch(number)
        began = time.perf_counter()
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - began)
        tokens.append(float(metrics["num_tokens"]))
    return seconds, tokens, losses


def run_trl(arguments: argparse.Namespace) -> tuple[list[float], list[float], list[float]]:
    """(seconds, tokens, loss) of every step. A step takes as many pairs as fill jaxft's rows."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    seconds: list[float] = []
    losses: list[float] = []
    tokens: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))
                tokens.append(float(logs["num_tokens"]))

    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            output_dir=folder, per_device_train_batch_size=arguments.pairs_per_step, max_steps=arguments.steps + 1,
            learning_rate=RATE, lr_scheduler_type="constant", beta=BETA, logging_steps=1, save_strategy="no",
            report_to=[], bf16=False, fp16=False, use_cpu=True, max_length=arguments.length, seed=0,
            gradient_checkpointing=arguments.checkpointing == "on", disable_tqdm=True, weight_decay=0.0,
        )  # fmt: skip
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32),
            args=settings,
            train_dataset=load_dataset("json", data_files=arguments.pairs, split="train"),
            processing_class=AutoTokenizer.from_pretrained(arguments.model),
            peft_config=LoraConfig(r=ADAPTER["r"], lora_alpha=ADAPTER["alpha"], target_modules="all-linear"),
            callbacks=[Clock()],
        )
        trainer.train()
    # TRL logs the number of all tokens so far.
    return seconds, [after - before for before, after in zip([0.0, *tokens], tokens, strict=False)], losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--rows", type=int, default=4, help="packed sequences in a step of jaxft")
    parser.add_argument("--pairs-per-step", type=int, default=8, help="pairs in a step of TRL")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="dots")
    parser.add_argument("--checkpointing", choices=("on", "off"), default="on")
    parser.add_argument("--only", choices=("jaxft", "trl"))
    arguments = parser.parse_args()
    if arguments.only:
        seconds, tokens, losses = (run_jaxft if arguments.only == "jaxft" else run_trl)(arguments)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        # The first step compiles.
        rate = sum(tokens[1:]) / sum(seconds[1:])
        found = {"rate": rate, "peak_bytes": peak, "tokens": tokens, "seconds": seconds, "losses": losses}
        print(json.dumps(found))
        return
    results: dict[str, list[dict[str, Any]]] = {"jaxft": [], "trl": []}
    for _ in range(arguments.rounds):
        for who, each in results.items():
            each.append(one := measure(__file__, arguments, who))
            tokens = statistics.mean(one["tokens"][1:])
            print(
                f"{who:6} {one['rate']:7.1f} tokens/s, {tokens:.0f} tokens a step, {one['peak_bytes'] / 1e9:.2f} GB, "
                f"loss {one['losses'][0]:.4f} to {one['losses'][-1]:.4f}",
                flush=True,
            )
    rate = {who: statistics.median(one["rate"] for one in each) for who, each in results.items()}
    peak = {who: max(one["peak_bytes"] for one in each) for who, each in results.items()}
    print(
        f"jaxft / trl: {rate['jaxft'] / rate['trl']:.2f}x the rate at {peak['jaxft'] / peak['trl']:.2f}x the memory "
        f"({arguments.length} tokens, remat={arguments.remat}, checkpointing={arguments.checkpointing})"
    )


if __name__ == "__main__":
    main()
