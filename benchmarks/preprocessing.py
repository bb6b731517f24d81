"""From rows to batches: jaxft and TRL take turns at the same chats, cold and from what they kept; then many short rows.

    python benchmarks/preprocessing.py --data=FOLDER --tokenizer=SmolLM2-135M-Instruct.Q4_1.gguf

data: a folder with gsm8k/train.jsonl and banking77/train.csv, of which --rows chats of two questions are made. Both
sides render them by the same ChatML template, mask all but the answers and use --processes processes; TRL's trainer has
a tiny model. Each measurement is a process of its own. Printed: seconds by the clock; CPU seconds, with those of child
processes, which say more on a busy machine; peak memory of the process. --short: rows of some 40 tokens, jaxft alone.
"""

import argparse
import csv
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from turns import measure

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chats(folder: Path, count: int) -> list[list[tuple[str, str]]]:
    """Conversations of a problem and a request, no two alike."""
    with open(folder / "gsm8k" / "train.jsonl", encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    with open(folder / "banking77" / "train.csv", encoding="utf-8", newline="") as file:
        requests = list(csv.DictReader(file))
    out = []
    for n in range(count):
        problem, request = problems[n % len(problems)], requests[n % len(requests)]
        asked = f"{request['text']} ({n})"
        out.append([(problem["question"], problem["answer"]), (asked, request["category"])])
    return out


def short_chats(count: int) -> list[list[tuple[str, str]]]:
    """Conversations of one short question."""
    return [[(f"What is {n} plus {n % 97}?", f"It is {n + n % 97}.")] for n in range(count)]


def write(path: Path, conversations: list[list[tuple[str, str]]]) -> str:
    """Writes rows of messages; the path."""
    with open(path, "w", encoding="utf-8") as file:
        for turns in conversations:
            messages = [
                {"role": role, "content": text}
                for turn in turns
                for role, text in zip(("user", "assistant"), turn, strict=True)
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return str(path)


def run_jaxft(arguments: argparse.Namespace) -> dict[str, Any]:
    """Until the first batch is there."""
    from jaxft.config import DataConfig, RunConfig
    from jaxft.data import prepare
    from jaxft.data.loader import Loader

    tokenizer = _tokenizer(arguments)
    began, cpu = time.perf_counter(), _cpu_seconds()
    data = DataConfig(train=arguments.path, num_proc=arguments.processes, cache=f"{arguments.folder}/jaxft")
    prepared = prepare(RunConfig(data=data), tokenizer)
    Loader(prepared.train_examples, batch_size=16, max_length=data.max_length, pad_id=tokenizer.pad_id).batch(0)
    return _measured(began, cpu) | {
        "tokens": prepared.examination.tokens,
        "trained": prepared.examination.trained_tokens,
    }


def run_trl(arguments: argparse.Namespace) -> dict[str, Any]:
    """Until the trainer has tokenised the rows."""
    os.environ |= {"HF_DATASETS_CACHE": f"{arguments.folder}/trl", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = _tokenizer(arguments).backend
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    settings = SFTConfig(
        output_dir=f"{arguments.folder}/run", assistant_only_loss=True, max_length=1024, report_to=[], use_cpu=True,
        dataset_num_proc=arguments.processes, bf16=False,
    )  # fmt: skip
    began, cpu = time.perf_counter(), _cpu_seconds()
    rows = datasets.load_dataset("json", data_files=arguments.path, split="train")
    trainer = SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
    out = _measured(began, cpu)
    ids, labels = trainer.train_dataset["input_ids"], trainer.train_dataset["labels"]
    return out | {"tokens": sum(map(len, ids)), "trained": sum(label != -100 for row in labels for label in row)}


def _tokenizer(arguments: argparse.Namespace) -> Any:
    from jaxft.data import load_tokenizer
    from jaxft.data.tokenizers.tokenizer import Tokenizer

    backend = load_tokenizer(arguments.tokenizer).backend
    backend.chat_template = TEMPLATE
    return Tokenizer(backend)


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _measured(began: float, cpu: float) -> dict[str, Any]:
    return {
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(_cpu_seconds() - cpu, 2),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "anonymous_mb": int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) // 1024,
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--short", type=int, default=1_000_000, help="number of short rows; 0: none")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", default="", help="for what is kept between measurements; by default a new one")
    parser.add_argument("--path", default="")
    parser.add_argument("--only", choices=["jaxft", "trl"])
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps((run_jaxft if arguments.only == "jaxft" else run_trl)(arguments)))
        return
    for number in range(arguments.rounds):
        with tempfile.TemporaryDirectory(dir=arguments.folder or None) as folder:
            arguments.folder = folder
            arguments.path = write(Path(folder, "chats.jsonl"), chats(Path(arguments.data), arguments.rows))
            for who in ("jaxft", "trl") if arguments.rows else ():
                for state in ("cold", "kept"):
                    print(number, who, state, measure(__file__, arguments, who), flush=True)
            if arguments.short:
                arguments.path = write(Path(folder, "short.jsonl"), short_chats(arguments.short))
                for state in ("cold", "kept"):
                    print(number, "jaxft, short rows", state, measure(__file__, arguments, "jaxft"), flush=True)
        arguments.folder = ""


if __name__ == "__main__":
    main()
