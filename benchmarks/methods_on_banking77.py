"""Full fine-tuning, LoRA and QLoRA on the same small task, over seeds: accuracy, and forgetting of other text.

    python benchmarks/methods_on_banking77.py --model=runs/models/SmolLM2-135M-Instruct \
        --banking77=FOLDER --gsm8k=FOLDER --to=runs/methods

The task is to name the intent of a customer's message, one of a few from Banking77: `jaxft train` with each method and
seed on the same rows, accuracy by generation on rows of the test set. Forgetting is the perplexity on text of another
kind (GSM8K's test set, as in quantization_table.py), before and after. Runs whose folder is complete are not repeated.
"""

import argparse
import csv
import json
import statistics
from pathlib import Path
from typing import Any

import quantization_table as texts
from rich.console import Console

import jaxft
from jaxft.runs.export import load_trained

METHODS = {
    "full": {"adapter.kind": "none", "optim.learning_rate": 5e-5},
    "lora": {"adapter.kind": "lora", "optim.learning_rate": 5e-4},
    "qlora": {"adapter.kind": "lora", "optim.learning_rate": 5e-4, "model.quantization": "nf4-dq"},
}
QUESTION = "Which intent does this message to a bank have? Answer with one of: {intents}.\n\n{text}"


def write_rows(source: Path, target: Path, intents: list[str], each: int) -> None:
    """Writes a question and its answer for `each` messages of every intent, in the order of the file."""
    taken = dict.fromkeys(intents, 0)
    listed = ", ".join(intents)
    with open(source, encoding="utf-8") as rows, open(target, "w", encoding="utf-8") as out:
        for row in csv.DictReader(rows):
            intent = row["category"]
            if intent in taken and taken[intent] < each:
                taken[intent] += 1
                question = QUESTION.format(intents=listed, text=row["text"].strip())
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": intent}]
                out.write(json.dumps({"messages": turns}) + "\n")


def run(method: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Summary of one training run, read from its folder if it is complete."""
    folder = Path(arguments.to) / f"{method}-{seed}"
    summary = folder / "summary.json"
    if summary.is_file():
        return json.loads(summary.read_text())
    overrides = {
        "output_dir": str(folder),
        "seed": seed,
        "model.path": arguments.model,
        "data.train": str(Path(arguments.to) / "train.jsonl"),
        "data.eval": str(Path(arguments.to) / "test.jsonl"),
        "data.max_length": 512,
        "train.batch_size": 4,
        "train.epochs": arguments.epochs,
        "optim.schedule": "linear",
        "optim.warmup_ratio": 0.1,
        "eval.metric": "exact_match",
        "eval.max_new_tokens": 16,
        "train.eval_every": None,
        "checkpoint.every": None,
        "checkpoint.best_metric": None,
        "export.adapter": False,
    }
    config = jaxft.get_config("configs/smollm2_135m_lora.py", overrides | METHODS[method])
    return jaxft.train(config, console=Console(quiet=True))


def main() -> None:
    """Prints a line for each run, then a Markdown table of means and standard deviations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "banking77", "gsm8k", "to"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--intents", type=int, default=8)
    parser.add_argument("--each", type=int, default=25, help="training rows of an intent")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8192, help="of the other text")
    arguments = parser.parse_args()
    to, source = Path(arguments.to), Path(arguments.banking77)
    to.mkdir(parents=True, exist_ok=True)
    with open(source / "train.csv", encoding="utf-8") as file:
        intents = sorted({row["category"] for row in csv.DictReader(file)})[: arguments.intents]
    write_rows(source / "train.csv", to / "train.jsonl", intents, arguments.each)
    write_rows(source / "test.csv", to / "test.jsonl", intents, 12)
    tokenizer = jaxft.load_tokenizer(arguments.model)
    other = texts.batches(texts.texts(arguments)["gsm8k"], tokenizer, arguments.tokens)
    for quantization in (None, METHODS["qlora"]["model.quantization"]):
        before = texts.perplexity(jaxft.load_model(arguments.model, quantization=quantization), other)
        print(f"base{f' in {quantization}' if quantization else ''}: perplexity on other text {before:.3f}", flush=True)
    lines = []
    for method in METHODS:
        scores, forgetting = [], []
        for seed in range(arguments.seeds):
            summary = run(method, seed, arguments)
            after = texts.perplexity(load_trained(str(to / f"{method}-{seed}")), other)
            scores.append(summary["tuned_score"])
            forgetting.append(after)
            print(
                f"{method} seed {seed}: accuracy {summary['base_score']:.1%} -> {summary['tuned_score']:.1%} of "
                f"{summary['examples']}, held-out loss {summary['eval_loss']:.4f}, other text {after:.3f}",
                flush=True,
            )
        accuracy, deviation = statistics.mean(scores), statistics.pstdev(scores)
        lines.append(
            f"| {method} | {accuracy:.1%} ± {deviation:.1%} | {statistics.mean(forgetting):.3f} ± "
            f"{statistics.pstdev(forgetting):.3f} |"
        )
    print("\n| method | accuracy | perplexity on other text |\n|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
