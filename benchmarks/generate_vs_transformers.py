"""Greedy generation with SmolLM2-135M: jaxft and transformers take turns at the same work; prints the ratio.

    python benchmarks/generate_vs_transformers.py --model=runs/models/SmolLM2-135M-Instruct

Both answer the same prompts, users' messages of the quickstart as the chat template renders them, in float32 with a KV
cache, on all cores of the machine, for exactly --tokens tokens each: stop tokens do not end a row. Prompts are cut to
the length of the shortest, so that neither side pads. Each measurement is a process of its own, and the ratio is that
of the medians. The rate is new tokens per second, with prefill and without compilation; the time of the first call,
which compiles, is printed separately. In float32 both should generate the same text: the share of equal tokens up to
the first difference shows whether they do.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

SIDES = ("jaxft", "transformers")
DATA = "jaxft/assets/quickstart/heldout.jsonl"


def prompts(model: str, batch: int) -> list[list[int]]:
    """`batch` prompts of one length, as token ids."""
    from jaxft.data import load_tokenizer

    tokenizer = load_tokenizer(model)
    with open(DATA, encoding="utf-8") as lines:
        chats = [json.loads(line)["messages"][:-1] for _, line in zip(range(batch), lines, strict=False)]
    if len(chats) < batch:
        sys.exit(f"{DATA} has {len(chats)} rows: --batch can be at most that")
    rows = [tokenizer.encode(tokenizer.render(chat, add_generation_prompt=True)) for chat in chats]
    length = min(map(len, rows))
    # Cut at the front: the generation prompt stays, and rows no longer share the system message as a prefix, which
    # jaxft would compute only once.
    return [row[-length:] for row in rows]


def jaxft_side(model: str, rows: list[list[int]], tokens: int) -> Callable[[], list[list[int]]]:
    from jaxft.checkpoint.load import load_model
    from jaxft.generation.settings import Sampling
    from jaxft.generation.tokens import generate_tokens

    module = load_model(model).module
    sampling = Sampling(max_new_tokens=tokens)
    return lambda: [list(one.tokens) for one in generate_tokens(module, rows, sampling=sampling)]


def transformers_side(model: str, rows: list[list[int]], tokens: int) -> Callable[[], list[list[int]]]:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = torch.tensor(rows)
    # The model's own generation_config may sample, penalise or stop.
    module.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    options = {"do_sample": False, "max_new_tokens": tokens, "attention_mask": torch.ones_like(ids)}

    def generate() -> list[list[int]]:
        with torch.inference_mode():
            return module.generate(ids, **options)[:, ids.shape[1] :].tolist()

    return generate


def run(arguments: argparse.Namespace, who: str) -> dict[str, Any]:
    """Measures one side in this process."""
    rows = prompts(arguments.model, arguments.batch)
    make = jaxft_side if who == "jaxft" else transformers_side
    generate = make(arguments.model, rows, arguments.tokens)
    seconds = []
    for _ in range(arguments.repeats + 1):
        began = time.perf_counter()
        produced = generate()
        seconds.append(time.perf_counter() - began)
    count = sum(map(len, produced))
    if count != arguments.batch * arguments.tokens:
        sys.exit(f"{who} generated {count} tokens, not {arguments.batch} x {arguments.tokens}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rate = count / statistics.median(seconds[1:])
    prompt = len(rows[0])
    return {"rate": rate, "peak_bytes": peak, "first_seconds": seconds[0], "prompt": prompt, "tokens": produced}


def measure(arguments: argparse.Namespace, who: str, batch: int) -> dict[str, Any]:
    """Measures one side in a process of its own."""
    command = [sys.executable, __file__, f"--model={arguments.model}", f"--only={who}", f"--batch={batch}"]
    command += [f"--tokens={arguments.tokens}", f"--repeats={arguments.repeats}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of tokens before the first one that differs in their row."""
    same = sum(
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in zip(ours, theirs, strict=True)
    )
    return same / sum(map(len, ours))


def compare(arguments: argparse.Namespace, batch: int) -> None:
    """Measures all rounds of one batch size and prints the ratio."""
    results: dict[str, list[dict[str, Any]]] = {who: [] for who in SIDES}
    for _ in range(arguments.rounds):
        for who in SIDES:
            one = measure(arguments, who, batch)
            results[who].append(one)
            print(
                f"batch {batch:2}  {who:12} {one['rate']:7.1f} tokens/s  first call {one['first_seconds']:.1f} s  "
                f"{one['peak_bytes'] / 1e9:.2f} GB",
                flush=True,
            )
    rate = {who: statistics.median(one["rate"] for one in each) for who, each in results.items()}
    ours, theirs = (results[who][-1] for who in SIDES)
    print(
        f"batch {batch:2}  jaxft / transformers: {rate['jaxft'] / rate['transformers']:.2f}x the rate "
        f"({ours['prompt']} prompt tokens, {arguments.tokens} new; "
        f"{agreement(ours['tokens'], theirs['tokens']):.1%} of the tokens equal)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="FOLDER")
    parser.add_argument("--batch", type=int, action="append", help="once per size; 1 and 16 by default")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each row")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of one process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--only", choices=SIDES, help="measure one side here and print JSON")
    arguments = parser.parse_args()
    batches = arguments.batch or [1, 16]
    if arguments.only:
        arguments.batch = batches[0]
        print(json.dumps(run(arguments, arguments.only)))
        return
    for batch in batches:
        compare(arguments, batch)


if __name__ == "__main__":
    main()
