"""Streams of `jaxft serve`: time to the first token and tokens a second, beside `jaxft.generate` with the same prompts.

    python benchmarks/serve_streams.py --model=runs/models/SmolLM2-135M-Instruct --streams=1,8,32 --tokens=64

A server is started in a process of its own, on this machine. After one request, which starts the engine, `--streams`
clients ask at once, each a question of the quickstart's held-out rows, greedily and for up to --tokens tokens. The time
to the first token is from sending the request to the first piece of text, its median and its largest over the streams;
the rate is all new tokens over the time until the last stream has ended. `jaxft.generate` then answers the same prompts
in a process of its own with as many slots, twice, of which the second call counts: it compiles nothing. The memory is
that of the server's process, without its engine.

    python benchmarks/serve_streams.py --model=FOLDER --streams=1,8 --job=jaxft/assets/quickstart/train.jsonl

also trains on these rows, LoRA in batches of 8: a few steps alone, then the same streams again beside it. The seconds
of a step, alone and beside each number of streams, are the medians of those that its log has.

    python benchmarks/serve_streams.py --url=http://127.0.0.1:8080/v1 --name=NAME

asks another server of the same protocol, such as `transformers serve` or that of llama.cpp, the same questions.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import openai

DATA = "jaxft/assets/quickstart/heldout.jsonl"
NAME = "model"
STEPS_ALONE = 8  # training steps that are timed with nothing beside them


def questions(count: int) -> list[list[dict[str, str]]]:
    """Conversations that end with the user, the rows of the quickstart in turn."""
    with open(DATA, encoding="utf-8") as lines:
        chats = [json.loads(line)["messages"][:-1] for line in lines]
    return [chats[number % len(chats)] for number in range(count)]


async def stream(client: openai.AsyncOpenAI, name: str, messages: Any, tokens: int) -> tuple[float, int]:
    """(seconds to the first text, new tokens) of one stream, as the server counts them."""
    started, first, counted = time.perf_counter(), 0.0, 0
    options = {"include_usage": True}
    pieces = await client.chat.completions.create(
        model=name, messages=messages, max_tokens=tokens, temperature=0, stream=True, stream_options=options
    )
    async for piece in pieces:
        if not first and piece.choices and piece.choices[0].delta.content:
            first = time.perf_counter() - started
        counted = counted if piece.usage is None else piece.usage.completion_tokens
    return first, counted


async def ask(url: str, key: str, name: str, streams: int, tokens: int) -> dict[str, float]:
    """The figures of so many streams at once."""
    async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=3600) as client:
        chats = questions(streams)
        await asyncio.gather(*(stream(client, name, chat, 8) for chat in chats))  # every shape is compiled
        started = time.perf_counter()
        results = await asyncio.gather(*(stream(client, name, chat, tokens) for chat in chats))
        seconds = time.perf_counter() - started
    firsts = [first for first, _ in results]
    return {
        "first_median_s": statistics.median(firsts),
        "first_largest_s": max(firsts),
        "tokens_per_s": sum(counted for _, counted in results) / seconds,
    }


def measure(url: str, key: str, name: str, streams: list[int], tokens: int) -> None:
    """Prints the figures of a server that runs."""
    for count in streams:
        figures = asyncio.run(ask(url, key, name, count, tokens))
        shown = "  ".join(f"{field} {value:.2f}" for field, value in figures.items())
        print(f"{count} streams: {shown}", flush=True)


def generate(model: str, streams: int, tokens: int) -> float:
    """Tokens a second of `jaxft.generate`; in the process of `--side`."""
    import jaxft
    from jaxft.generation.settings import Sampling
    from jaxft.generation.text import generate_text

    loaded, tokenizer = jaxft.load_model(model), jaxft.load_tokenizer(model)
    for _ in range(2):
        started = time.perf_counter()
        sampling = Sampling(max_new_tokens=tokens)
        answers = generate_text(loaded.module, tokenizer, questions(streams), sampling, slots=streams)
        seconds = time.perf_counter() - started
    return sum(len(one.tokens) for one in answers) / seconds


def beside_a_job(client: openai.OpenAI, path: str, measure_streams: Callable[[int], None], streams: list[int]) -> None:
    """Prints the seconds of a training step alone and beside streams, whose figures it prints too."""
    with open(path, "rb") as rows:
        file = client.files.create(file=rows, purpose="fine-tune")
    wanted = {"jaxft": {"config": {"train.log_every": 1}}}
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 50, "batch_size": 8}}}
    job = client.fine_tuning.jobs.create(
        model=NAME,
        training_file=file.id,
        method=method,  # type: ignore[arg-type]
        extra_body=wanted,
    )

    def steps() -> list[float]:
        answer: Any = client.get(f"/jaxft/jobs/{job.id}/metrics", cast_to=object)
        return [row["step_seconds"] for row in answer["data"] if "step_seconds" in row]

    while len(steps()) < STEPS_ALONE + 1:
        state = client.fine_tuning.jobs.retrieve(job.id)
        if state.status in ("failed", "cancelled", "succeeded"):
            sys.exit(f"the job is {state.status}: {state.error}")
        time.sleep(1)
    print(f"a training step alone: {statistics.median(steps()[1:]):.2f} s", flush=True)  # the first one compiles
    for count in streams:
        before = len(steps())
        measure_streams(count)
        # The first of them began before the streams did.
        print(f"a training step beside {count} streams: {statistics.median(steps()[before + 1 :]):.2f} s", flush=True)
    client.fine_tuning.jobs.cancel(job.id)


def serve(arguments: argparse.Namespace, streams: list[int]) -> None:
    """Starts the server, and prints its figures."""
    with tempfile.TemporaryDirectory() as state:
        command = [sys.executable, "-m", "jaxft.cli", "serve", f"--model={NAME}={arguments.model}", f"--state={state}"]
        command += ["--port=0", f"--slots={arguments.slots}", f"--context={arguments.context}"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        if server.stdout is None:
            sys.exit("the server has no output")
        url = next(word.rstrip(",") for word in server.stdout.readline().split() if word.startswith("http"))
        key = server.stdout.readline().split()[-1]
        try:
            client = openai.OpenAI(base_url=url, api_key=key, timeout=3600)
            started = time.perf_counter()
            client.chat.completions.create(model=NAME, messages=questions(1)[0], max_tokens=2)  # type: ignore[arg-type]
            print(f"first answer after {time.perf_counter() - started:.1f} s: the engine is started", flush=True)
            measure(url, key, NAME, streams, arguments.tokens)
            system: Any = client.get("/jaxft/system", cast_to=object)
            print(f"memory of the server: {system['server_bytes'] / 2**20:.0f} MiB", flush=True)
            if arguments.job is not None:
                beside_a_job(
                    client, arguments.job, lambda one: measure(url, key, NAME, [one], arguments.tokens), streams
                )
        finally:
            server.terminate()
            server.wait()


def main() -> None:
    """Prints the figures of the server, and those of `jaxft.generate`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or GGUF file")
    parser.add_argument("--url", help="of another server that runs, which is asked in place of `jaxft serve`")
    parser.add_argument("--name", default=NAME, help="of the model there")
    parser.add_argument("--streams", default="1,8,32", help="numbers of streams at once")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a stream, at most")
    parser.add_argument("--job", help="rows of a job that trains meanwhile")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--side", type=int, help="used by the program itself: jaxft.generate with so many prompts")
    arguments = parser.parse_args()
    if arguments.side is not None:
        print(f"{arguments.side} prompts with jaxft.generate: "
              f"tokens_per_s {generate(arguments.model, arguments.side, arguments.tokens):.2f}")  # fmt: skip
        return
    streams = [int(one) for one in arguments.streams.split(",")]
    if arguments.url is not None:
        return measure(arguments.url, "none", arguments.name, streams, arguments.tokens)
    if arguments.model is None:
        parser.error("--model names a folder or GGUF file")
    serve(arguments, streams)
    for count in streams:
        given = [f"--model={arguments.model}", f"--tokens={arguments.tokens}", f"--side={count}"]
        subprocess.run([sys.executable, __file__, *given], check=True)


if __name__ == "__main__":
    main()
