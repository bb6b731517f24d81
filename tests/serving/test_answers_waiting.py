"""Requests that come while an engine starts or ends: they wait, within bounds, and a stream says so."""

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from answering import SMOKE, Served, serving
from servers import ENGINE, MODEL, wait_for

from jaxft.serving.engines.engine import Engine
from jaxft.serving.engines.limits import Limits
from jaxft.serving.engines.spec import EngineSpec


def held(folder: Path) -> Path:
    """A file that keeps engines from becoming ready."""
    path = folder / "hold"
    path.touch()
    return path


def lines_of(served: Served, todo: dict[str, Any]) -> Any:
    messages = [{"role": "user", "content": json.dumps(todo)}]
    create = served.client.chat.completions.with_streaming_response.create
    return create(model=MODEL, messages=messages, stream=True)


def test_a_stream_has_comments_while_its_engine_starts(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxft.serving.endpoints.answers.BEAT_SECONDS", 0.05)
    hold = held(tmp_path)
    with serving(tmp_path) as running:
        served = Served(running, tmp_path)
        with lines_of(served, {}) as good, lines_of(served, {"refuse": "context_length_exceeded"}) as refused:
            lines = good.iter_lines()
            assert next(lines) == ": waiting" and not served.lines("asked")
            wait_for(lambda: served.engine()["phase"] == "loading" and served.engine()["open"] == 2, "the engine")
            with pytest.raises(openai.APITimeoutError):  # a client that does not wait leaves the queue
                served.chat(running.client(timeout=0.3))
            wait_for(lambda: served.engine()["open"] == 2, "the end of the third request")
            hold.unlink()
            rest = [line for line in lines if line and line != ": waiting"]
            assert rest[-1] == "data: [DONE]" and json.loads(rest[0][6:])["choices"][0]["delta"]["role"] == "assistant"
            told = [line for line in refused.iter_lines() if line and line != ": waiting"]
        # The status is sent already, so a refusal comes as an event.
        assert [json.loads(line[6:])["error"]["code"] for line in told] == ["context_length_exceeded"]
        assert served.chat().choices and len(served.lines("starts")) == 1 and served.engine()["open"] == 0


def test_the_wait_for_an_engine_is_bounded(tmp_path):
    hold = held(tmp_path)
    with serving(tmp_path, start=0.2) as running:
        served = Served(running, tmp_path)
        with pytest.raises(openai.InternalServerError, match="still being started") as caught:
            served.chat(todo={"pieces": ["late"]})
        assert (caught.value.status_code, caught.value.code) == (503, "engine_starting")
        assert caught.value.response.headers["retry-after"] == "30"
        hold.unlink()
        wait_for(lambda: served.engine()["phase"] == "warm", "the engine")
        assert served.chat().choices[0].message.content == "Hello there"
        assert len(served.lines("cancelled")) == len(served.lines("starts")) == 1


def test_what_is_asked_while_an_engine_ends_is_answered_by_the_next_one(tmp_path):
    spec = EngineSpec(
        model=SMOKE, base=None, slots=1, context=9, adapters=0, max_rank=1, dtype="float32", quantization=None, cache=""
    )
    command = (*ENGINE, f"--folder={tmp_path}")
    request = {"kind_of": "completion", "prompts": ["{}"], "settings": {"n": 1, "alternatives": 0, "logprobs": False}}

    async def ask(engine: Engine) -> list[str]:
        answer = engine.open(request, key="k", choices=1, size=1)
        await answer.begin()
        told = [message["text"] async for message in answer.messages() if message and message["kind"] == "piece"]
        answer.close()
        return told

    async def walk() -> None:
        engine = Engine("tiny", spec, command, tmp_path / "log", Limits(slots=1, queue=4))
        assert await ask(engine) == ["Hello", " there"]
        hold = held(tmp_path)
        ending = asyncio.create_task(engine.end())
        while engine.phase != "ending":
            await asyncio.sleep(0)
        asking = asyncio.create_task(ask(engine))
        await asyncio.sleep(0)
        hold.unlink()
        await ending
        assert await asking == ["Hello", " there"] and engine.is_idle and engine.shown()["deaths"] == 0
        await engine.end()
        assert engine.phase == "stopped" and not engine.is_alive

    asyncio.run(walk())
    assert len((tmp_path / "starts").read_text().splitlines()) == 2
