"""Answers of a real engine on a tiny model with drawn weights, against `jaxft.generate` and the model's logits."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import openai
import pytest
from servers import MODEL, REAL_ENGINE, create, in_thread, rows, until, wait_for, write_adapter, write_model

import jaxft

ASK = [{"role": "user", "content": "Who are you?"}]
OTHER = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And who is that over there?"}]
NAMES = ("base", "one", "two")
CONTEXT = 2048


class Served:
    """A server with a real engine, its base, and two tuned models of it by the names of `NAMES`."""

    def __init__(self, running: Any, folder: Path) -> None:
        self.running, self.client, self.base = running, running.client(), str(folder / "model")
        self.names, self.folders = {"base": MODEL}, {}
        for seed, name in enumerate(NAMES[1:]):
            self.add(name, seed)
        self._texts: dict[Any, Any] = {}

    def add(self, name: str, seed: int, *, dora: bool = False) -> None:
        """Puts an adapter into the place of a model that the stand-in for workers made."""
        job = until(self.client, create(self.client, rows(steps=1), suffix=name).id, "succeeded")
        self.names[name] = job.fine_tuned_model
        self.folders[name] = self.running.state / "models" / f"{job.id}-final"
        write_adapter(self.folders[name], self.base, seed, dora=dora)

    def expected(self, name: str, messages: Any, **settings: Any) -> Any:
        """(model, tokenizer, answer) by `jaxft.generate`."""
        key = (name, str(messages), str(settings))
        if key not in self._texts:
            path = self.base if name == "base" else str(self.folders[name])
            given = {} if name == "base" else {"base": self.base}
            model, tokenizer = jaxft.load_model(path, **given), jaxft.load_tokenizer(path, **given)
            self._texts[key] = model, tokenizer, jaxft.generate(model, tokenizer, messages, slots=1, **settings)
        return self._texts[key]

    def chat(self, name: str = "base", messages: Any = ASK, **fields: Any) -> Any:
        fields = {"max_tokens": 12, "temperature": 0, **fields}
        return self.client.chat.completions.create(model=self.names[name], messages=messages, **fields)

    def open(self) -> int:
        return sum(one["open"] for one in self.client.get("/jaxft/system", cast_to=object)["engines"])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("engine")
    model = write_model(folder / "model")
    sizes = {"slots": 4, "context": CONTEXT, "adapters": 2}
    with in_thread(folder / "state", model, parts={"engine": REAL_ENGINE}, **sizes) as running:
        yield Served(running, folder)


def test_base_and_tuned_models_answer_at_once_as_each_does_alone(served):
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=served.running.url, api_key=served.running.key, max_retries=0) as client:
            return await asyncio.gather(*[
                client.chat.completions.create(
                    model=served.names[name], messages=messages, max_tokens=12, temperature=0, logprobs=True
                )
                for messages in (ASK, OTHER) for name in NAMES
            ])  # fmt: skip

    answers = [answer.choices[0].message.content for answer in asyncio.run(ask())]
    assert answers[1] == served.expected("one", ASK, max_new_tokens=12)[2]
    alone = [served.chat(name, messages).choices[0].message.content for messages in (ASK, OTHER) for name in NAMES]
    assert answers == alone
    assert len(set(answers)) == 6, "the adapters change nothing"


@pytest.mark.slow
def test_logprobs_are_those_of_the_model(served):
    choice = served.chat("one", logprobs=True, top_logprobs=5, seed=3, temperature=1.5, n=2).choices[1]
    model, tokenizer, _ = served.expected("one", ASK, max_new_tokens=12)
    prompt = tokenizer.encode(tokenizer.render(ASK, add_generation_prompt=True))
    tokens = [byte_token(tokenizer, one) for one in choice.logprobs.content]
    logits = model.logits([[*prompt, *tokens]])[0, len(prompt) - 1 : -1]
    expected = np.asarray(jax.nn.log_softmax(logits.astype(np.float32)))
    for row, token, one in zip(expected, tokens, choice.logprobs.content, strict=True):
        assert one.logprob == pytest.approx(row[token], abs=2e-4)
        assert [top.logprob for top in one.top_logprobs] == pytest.approx(np.sort(row)[::-1][:5].tolist(), abs=2e-4)
        assert byte_token(tokenizer, one.top_logprobs[0]) == int(row.argmax())
    assert len(tokens) == 12 or choice.finish_reason == "stop"


def byte_token(tokenizer: Any, shown: Any) -> int:
    """The token that stands for a byte, or for a special text."""
    if shown.token.startswith("<|"):
        return tokenizer.encode(shown.token)[0]
    return next(i for i in range(tokenizer.vocab_size) if one_byte(tokenizer, i) == shown.bytes)


def one_byte(tokenizer: Any, token: int) -> list[int] | None:
    from jaxft.serving.engine.logprobs import shown_token

    return shown_token(tokenizer, token, 0.0)["bytes"]


def test_one_seed_gives_one_text_alone_and_among_others(served):
    alone = served.chat("two", seed=11, temperature=1).choices[0].message.content
    several = served.chat("two", seed=11, temperature=1, n=3)
    texts = [choice.message.content for choice in several.choices]
    assert texts[0] == alone and len(set(texts)) == 3 and several.usage.completion_tokens <= 36
    streams = [served.chat(name, OTHER, stream=True, max_tokens=60, temperature=1) for name in ("base", "one")]
    assert served.chat("two", seed=11, temperature=1).choices[0].message.content == alone
    for stream in streams:
        stream.close()
    assert served.chat("two", seed=12, temperature=1).choices[0].message.content != alone


def test_streams_stops_and_completions_give_the_same_text(served):
    whole = str(served.expected("one", ASK, max_new_tokens=12)[2])
    chunks = list(served.chat("one", stream=True, n=2))
    for index in range(2):
        pieces = [choice for one in chunks for choice in one.choices if choice.index == index]
        assert "".join(piece.delta.content or "" for piece in pieces) == whole
        assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["length"]
    stop = whole[5:7]
    choice = served.chat("one", stop=[stop, "never"]).choices[0]
    assert choice.message.content == whole[: whole.index(stop)] and choice.finish_reason == "stop"
    _, tokenizer, _ = served.expected("one", ASK, max_new_tokens=12)
    prompt = tokenizer.render(ASK, add_generation_prompt=True)
    create = served.client.completions.create
    given = {"model": served.names["one"], "max_tokens": 12, "temperature": 0}
    for one in (prompt, tokenizer.encode(prompt)):
        assert create(prompt=one, **given).choices[0].text == whole
    two = create(prompt=["ab", prompt], **given, n=2, logprobs=2)
    assert [choice.text == whole for choice in two.choices] == [False, False, True, True]
    assert "".join(two.choices[2].logprobs.tokens) == whole or "�" in whole


def test_requests_that_do_not_fit_are_refused(served):
    with pytest.raises(openai.BadRequestError, match="room for 2,048") as caught:
        served.chat(max_tokens=CONTEXT - 10)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="room for 2,048"):
        served.chat(messages=[{"role": "user", "content": "x" * CONTEXT}], max_tokens=None, stream=True)
    with pytest.raises(openai.BadRequestError, match="shows no tools"):
        served.chat(tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.BadRequestError, match="enable_thinking"):
        served.chat(extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    with pytest.raises(openai.BadRequestError, match="below 259"):
        served.client.completions.create(model=MODEL, prompt=[1, 259])
    with pytest.raises(openai.BadRequestError, match="empty"):
        served.client.completions.create(model=MODEL, prompt="")


def test_a_client_that_is_gone_frees_its_slot(served):
    tokens = CONTEXT - 100  # these answers would end long after the clients are gone
    streams = [served.chat(stream=True, max_tokens=tokens, n=2) for _ in range(3)]
    for stream in streams:
        next(iter(stream))
    assert served.open() == 6
    for stream in streams:
        stream.close()
    wait_for(lambda: not served.open(), "the end of the answers")
    assert served.chat("one").choices[0].message.content == served.expected("one", ASK, max_new_tokens=12)[2]


@pytest.mark.slow
def test_more_adapters_than_places_and_a_deleted_one(served):
    served.add("three", 7)
    for name in (*NAMES, "three", "one", "three", "two"):
        assert served.chat(name).choices[0].message.content == served.expected(name, ASK, max_new_tokens=12)[2], name
    stream = served.chat("three", OTHER, stream=True, max_tokens=CONTEXT - 200)
    next(iter(stream))
    served.client.models.delete(served.names["three"])
    with pytest.raises(openai.NotFoundError):
        served.chat("three")
    assert list(stream)[-1].choices[0].finish_reason
    wait_for(lambda: not served.folders["three"].exists(), "the end of the folder")


@pytest.mark.slow
def test_other_adapters_answer_alone(served):
    served.add("dora", 5, dora=True)
    expected = served.expected("dora", ASK, max_new_tokens=12)[2]
    assert served.chat("dora").choices[0].message.content == expected
    engines = served.client.get("/jaxft/system", cast_to=object)["engines"]
    assert [one["model"] for one in engines] == [MODEL, served.names["dora"]]
    assert served.chat("one").choices[0].message.content == served.expected("one", ASK, max_new_tokens=12)[2]


@pytest.mark.slow
def test_a_killed_engine_is_started_anew(served):
    stream = served.chat("one", stream=True, max_tokens=CONTEXT - 100)
    next(iter(stream))
    kill_engine(served.running.state / "engines" / "tiny.log")
    with pytest.raises(openai.APIError, match="ended before"):
        list(stream)
    assert served.chat("one").choices[0].message.content == served.expected("one", ASK, max_new_tokens=12)[2]


def kill_engine(log: Path) -> None:
    import re
    import signal

    os.kill(int(re.findall(r"process (\d+):", log.read_text())[-1]), signal.SIGKILL)
