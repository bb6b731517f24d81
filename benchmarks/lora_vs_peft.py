"""Training SmolLM2-135M: jaxft and transformers + PEFT take turns at the same work; prints the ratio.

    python benchmarks/lora_vs_peft.py --model=runs/models/SmolLM2-135M-Instruct [--methods=full,lora,qlora]

`qlora` is LoRA on a base in NF4 with double quantisation, for PEFT by bitsandbytes; `full` trains all weights. Both
train rank 16 on all linear layers in float32 with AdamW on the same packed rows (the quickstart's messages), on all
cores of the machine. Each measurement is a process of its own, so that its peak memory is too, and the ratio is that of
the medians. `--loss=assistant` trains only on the answers, as fine-tuning usually does: jaxft then
skips the vocabulary products of prompt tokens, PEFT cannot.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np


def rows(model: str, batch: int, length: int, steps: int, loss: str) -> list[Any]:
    """`steps` batches of packed rows."""
    from jaxft.config import resolve
    from jaxft.data import load_tokenizer, prepare
    from jaxft.data.loader import Loader

    train = {"train": "jaxft/assets/quickstart/train.jsonl", "max_length": length, "train_on": loss}
    config = resolve({"model": {"path": model}, "data": train})
    tokenizer = load_tokenizer(model)
    examples = prepare(config, tokenizer).train_examples
    loader = Loader(examples, batch_size=batch, max_length=length, seed=0, pad_id=tokenizer.pad_id)
    return [loader.batch(step) for step in range(steps)]


def run_jaxft(arguments: argparse.Namespace) -> tuple[list[float], list[float]]:
    import jax

    from jaxft.checkpoint.load import load_model
    from jaxft.config import AdapterConfig, OptimConfig
    from jaxft.objectives.sft import sft_loss
    from jaxft.optim.make import make_optimizer, make_schedule
    from jaxft.runs.build import attach_adapter
    from jaxft.training.state import create
    from jaxft.training.step import make_train_step

    quantization = "nf4-dq" if arguments.method == "qlora" else None
    loaded = load_model(arguments.model, remat=arguments.remat, quantization=quantization)
    kind = "none" if arguments.method == "full" else "lora"
    attach_adapter(loaded.module, AdapterConfig(kind=kind, r=16, alpha=32.0), seed=0)
    optim = OptimConfig(schedule="constant", learning_rate=1e-3)
    schedule = make_schedule(optim, 100)
    tx = make_optimizer(optim, schedule)
    graphdef, state = create(loaded.module, tx, 0)
    step = jax.jit(make_train_step(graphdef, sft_loss, tx, schedule), donate_argnums=0)
    seconds, losses = [], []
    for batch in rows(arguments.model, arguments.batch, arguments.length, arguments.steps + 1, arguments.loss):
        began = time.perf_counter()
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - began)
    return seconds, losses


def run_peft(arguments: argparse.Namespace) -> tuple[list[float], list[float]]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.manual_seed(0)
    options = {}
    if arguments.method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, **options).train()
    if arguments.method != "full":
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    seconds, losses = [], []
    for batch in rows(arguments.model, arguments.batch, arguments.length, arguments.steps + 1, arguments.loss):
        began = time.perf_counter()
        # transformers shifts labels itself: the label of a position is its own token.
        labels = np.full_like(batch.tokens_BS, -100)
        labels[:, 1:] = np.where(batch.weights_BS[:, :-1] > 0, batch.tokens_BS[:, 1:], -100)
        loss = model(
            input_ids=torch.from_numpy(batch.tokens_BS).long(),
            position_ids=torch.from_numpy(batch.positions_BS).long(),
            labels=torch.from_numpy(labels).long(),
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        seconds.append(time.perf_counter() - began)
    return seconds, losses


def measure(arguments: argparse.Namespace, who: str, method: str) -> dict[str, Any]:
    """Measures one side in a process of its own."""
    command = [sys.executable, __file__, f"--model={arguments.model}", f"--only={who}", f"--batch={arguments.batch}"]
    command += [f"--length={arguments.length}", f"--steps={arguments.steps}", f"--loss={arguments.loss}"]
    command += [f"--remat={arguments.remat}", f"--method={method}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loss", choices=("all", "assistant"), default="all")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="dots")
    parser.add_argument("--methods", default="lora", help="of full, lora and qlora, with commas")
    parser.add_argument("--method", choices=("full", "lora", "qlora"), help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("jaxft", "peft"))
    arguments = parser.parse_args()
    if arguments.only:
        seconds, losses = (run_jaxft if arguments.only == "jaxft" else run_peft)(arguments)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rate = arguments.batch * arguments.length / statistics.median(seconds[1:])
        print(json.dumps({"rate": rate, "peak_bytes": peak, "first_seconds": seconds[0], "losses": losses}))
        return
    runs = [(method, who) for method in arguments.methods.split(",") for who in ("jaxft", "peft")]
    results: dict[tuple[str, str], list[dict[str, Any]]] = {run: [] for run in runs}
    for _ in range(arguments.rounds):
        for method, who in runs:
            one = measure(arguments, who, method)
            results[method, who].append(one)
            print(f"{method:6}{who:6} {one['rate']:7.1f} tokens/s  {one['peak_bytes'] / 1e9:.2f} GB", flush=True)
    rate = {run: statistics.median(one["rate"] for one in each) for run, each in results.items()}
    peak = {run: max(one["peak_bytes"] for one in each) for run, each in results.items()}
    for method in arguments.methods.split(","):
        ours, theirs = (method, "jaxft"), (method, "peft")
        ratio, memory = rate[ours] / rate[theirs], peak[ours] / peak[theirs]
        print(f"{method}: jaxft / peft: {ratio:.2f}x the rate at {memory:.2f}x the memory")
        if ("lora", "jaxft") in rate:
            print(f"{method}: {rate[ours] / rate['lora', 'jaxft']:.2f}x the rate of jaxft's LoRA")
    print(f"remat={arguments.remat}, loss={arguments.loss}, batch {arguments.batch} x {arguments.length}")


if __name__ == "__main__":
    main()
