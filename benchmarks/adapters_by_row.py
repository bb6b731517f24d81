"""What LoRA by row costs: the time of a decoding step for rows of the base, of one adapter and of many.

    python benchmarks/adapters_by_row.py --model=runs/models/SmolLM2-135M-Instruct [--adapters=8] [--slots=8]
    python benchmarks/adapters_by_row.py --smoke

Every case answers the same prompts in --slots slots with a resident engine and random adapters on all linear layers:

- no room: an engine that has no room for adapters, with the base;
- base: one that has room, and all rows are of the base;
- one: all rows have the same adapter; many: each row has the next one.

The cases take turns, and the time of a case is the median of its rounds: seconds of decoding by tokens of a row, but
for prefill and compilation. --smoke takes a tiny random model.
"""

import argparse
import statistics
import time
from itertools import count

import jax
import numpy as np

from jaxft.adapters.named import AdapterModules, take
from jaxft.generation.request import Request
from jaxft.generation.settings import Sampling
from jaxft.nn.decoder import Decoder
from jaxft.resident import ResidentEngine, memory_bytes, resident_engine

TINY = {
    "model_type": "llama", "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
NUMBERS = count(1)  # of requests


def load(path: str | None, dtype: str) -> Decoder:
    """The model of a folder; without one, a tiny random one."""
    from jaxft.checkpoint.load import load_model
    from jaxft.models import config_from_hf, random_model

    if path is None:
        return random_model(config_from_hf(TINY), seed=0)
    return load_model(path, dtype=dtype, param_dtype=dtype).module


def random_adapter(model: Decoder, rank: int, seed: int) -> AdapterModules:
    """A LoRA on all linear layers that changes what the model says."""
    from flax import nnx

    from jaxft.adapters.attach import adapters, attach
    from jaxft.adapters.lora import LoRASettings, lora_factory

    copy = nnx.merge(*nnx.split(model))
    attach(copy, ["all-linear"], lora_factory(LoRASettings(r=rank, alpha=2.0 * rank)), jax.random.key(seed))
    for number, lora in enumerate(adapters(copy).values()):
        shape = lora.lora_b.get_value().shape  # type: ignore[attr-defined]  # they are LoRA
        b = 0.01 * jax.random.normal(jax.random.fold_in(jax.random.key(seed), number), shape)
        lora.lora_b.set_value(b)  # type: ignore[attr-defined]
    return take(copy)


def step_seconds(engine: ResidentEngine, prompts: list[tuple[int, ...]], numbers: list[int], tokens: int) -> float:
    """Seconds of a decoding step while all slots are busy."""
    sampling = Sampling(max_new_tokens=tokens)
    for prompt, number in zip(prompts, numbers, strict=True):
        engine.submit(Request(id=next(NUMBERS), prompt=prompt, sampling=sampling, adapter=number))
    for _ in prompts:
        engine.step()  # each computes one prompt
    before = time.perf_counter()
    while engine.step():
        pass
    return (time.perf_counter() - before) / (tokens - 1)


def main() -> None:
    """Prints the median of every case, and what it takes of memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="float32")
    for name, default in (
        ("adapters", 8), ("rank", 16), ("slots", 8), ("length", 256), ("prompt", 32), ("tokens", 65), ("rounds", 5),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    if not given.smoke and given.model is None:
        parser.error("give --model=FOLDER, or --smoke")
    if given.smoke:
        given.model, given.adapters, given.slots, given.tokens, given.rounds, given.rank = None, 2, 2, 5, 1, 4
    model = load(given.model, given.dtype)
    sizes = {"slots": given.slots, "length": given.length}
    room = {"adapters": given.adapters, "max_rank": given.rank}
    print(f"bytes of the cache and of the adapters: {tuple(memory_bytes(model, **sizes, **room))}")
    plain = resident_engine(model, stop_ids=(), adapters=0, **sizes)
    engine = resident_engine(model, stop_ids=(), **sizes, **room)
    for number in range(1, given.adapters + 1):
        engine.write_adapter(number, random_adapter(model, given.rank, number))
    draw = np.random.default_rng(0)
    prompts = [tuple(draw.integers(0, 256, given.prompt).tolist()) for _ in range(given.slots)]
    each = [1 + row % given.adapters for row in range(given.slots)]
    cases = {
        "no room": (plain, [0] * given.slots),
        "base": (engine, [0] * given.slots),
        "one": (engine, [1] * given.slots),
        "many": (engine, each),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(given.rounds + 1):  # the first compiles
        for name, (server, numbers) in cases.items():
            took = step_seconds(server, prompts, numbers, given.tokens)
            if turn:
                seconds[name].append(took)
    for name, measured in seconds.items():
        print(f"{name:8} {1000 * statistics.median(measured):8.2f} ms a step (least {1000 * min(measured):.2f})")


if __name__ == "__main__":
    main()
