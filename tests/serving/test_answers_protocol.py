"""chat/completions and completions over HTTP, with a stand-in for engines: fields, streams, errors, queues, deaths."""

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from answering import SMOKE, Served, serving
from servers import MODEL, create, rows, until, wait_for

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("answers")
    with serving(folder) as running:
        yield Served(running, folder)


def test_the_engine_starts_with_the_first_request_and_is_told_the_settings(served):
    assert not served.client.get("/jaxft/system", cast_to=object)["engines"]
    answer = served.chat()
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason, choice.message.role) == ("Hello there", "stop", "assistant")
    assert answer.usage.to_dict() == {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    assert answer.model == MODEL and answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    spec = json.loads((served.folder / "spec.json").read_text())
    assert spec["model"] == SMOKE and spec["slots"] == 2 and spec["context"] == 99 and spec["adapters"] == 8
    engine = served.engine()
    assert engine["phase"] == "warm" and engine["open"] == 0 and engine["devices"]["platform"] == "none"
    asked = served.asked()["settings"]
    assert asked["temperature"] == 1.0 and asked["max_tokens"] is None and 0 <= asked["seed"] < 2**32


FIELDS = {
    "temperature": 0.5, "top_p": 0.9, "n": 2, "stop": ["a", "b"], "seed": -1, "max_completion_tokens": 5,
    "user": "u", "metadata": {"a": "b"}, "service_tier": "auto", "store": False, "verbosity": "low",
    "frequency_penalty": 0, "response_format": {"type": "text"}, "presence_penalty": None, "tool_choice": None,
}  # fmt: skip


def test_fields_reach_the_engine_and_those_without_effect_do_not(served):
    extra = {"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.5, "chat_template_kwargs": {"enable_thinking": False}}
    parts = [{"type": "text", "text": "{}"}]
    messages = [
        {"role": "developer", "content": "d"}, {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{\"a\": [1]}"}}]},
        {"role": "tool", "content": "r", "tool_call_id": "call_1"}, {"role": "user", "content": parts},
    ]  # fmt: skip
    answer = served.client.chat.completions.create(model=MODEL, messages=messages, **FIELDS, extra_body=extra)
    assert [choice.index for choice in answer.choices] == [0, 1]
    asked = served.asked()
    assert asked["settings"] == {
        "max_tokens": 5, "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.5,
        "seed": 2**32 - 1, "stop": ["a", "b"], "logprobs": False, "alternatives": 0,
    }  # fmt: skip
    assert asked["variables"] == {"enable_thinking": False} and asked["tools"] == []
    assert asked["messages"][1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"a": [1]}}
    assert asked["messages"][3] == {"role": "user", "content": "{}"} and asked.keys().isdisjoint(FIELDS.keys())


WRONG = [
    ({"temprature": 1}, "Did you mean 'temperature'"),
    ({"temperature": 2.1}, "from 0 to 2"),
    ({"n": 17}, "1 to 16"),
    ({"n": 0}, "1 to 16"),
    ({"stop": ["a"] * 5}, "at most 4"),
    ({"stop": ""}, "1 to 1,000"),
    ({"seed": 0.5}, "seed"),
    ({"top_logprobs": 2}, "logprobs: true"),
    ({"logprobs": True, "top_logprobs": 21}, "0 to 20"),
    ({"top_p": 0}, "above"),
    ({"stream_options": {"include_usage": True}}, "stream: true"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "dif"),
    ({"tool_choice": "required", "tools": [WEATHER]}, "not served yet"),
    ({"logit_bias": {"1": 2}}, "not served yet"),
    ({"response_format": {"type": "json_object"}}, "not served yet"),
    ({"parallel_tool_calls": False}, "not served yet"),
    ({"presence_penalty": 0.5}, "not served yet"),
    ({"best_of": 2}, "not served yet"),
    ({"echo": True}, "not served yet"),
    ({"functions": [{"name": "f"}]}, "give tools"),
    ({"modalities": ["audio"]}, "only 'text'"),
    ({"store": True}, "kept"),
    ({"audio": {}}, "texts"),
    ({"prediction": {"type": "content"}}, "leave it out"),
    ({"web_search_options": {}}, "not se"),
    ({"reasoning_effort": "low"}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"tools": 1}}, "Unknown field"),
    ({"chat_template_kwargs": {"thinking": []}}, "short text"),
    ({"messages": []}, "list of 1 to"),
    ({"min_p": 1}, "below"),
    ({"messages": [{"role": "sytem", "content": "a"}]}, "must be one of"),
    ({"messages": [{"role": "user"}]}, "missing"),
    ({"messages": [{"role": "function", "content": "a", "name": "f"}]}, "role tool"),
    ({"suffix": "x"}, "at their end"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "answers texts"),
    ({"messages": [{"role": "user", "content": "a", "contents": "b"}]}, "Did you mean 'content'"),
    ({"top_k": 0}, "top_k"),
    ({"tools": [WEATHER, WEATHER]}, "same name"),
    ({"tools": [{"type": "web_search"}]}, "type function"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "characters"),
    ({"stream": 1}, "true or false"),
    ({"tools": [{"type": "function", "function": {"name": "a", "strict": True}}]}, "not served yet"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "tool_call_id is missing"),
    ({"service_tier": "flex"}, "one tier"),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{"}}],
                }
            ]
        },
        "JSON object",
    ),
]


def test_wrong_fields_are_refused_by_name(served):
    before = len(served.lines("asked"))
    for fields, message in WRONG:
        with pytest.raises(openai.BadRequestError, match=message) as caught:
            served.client.post("/chat/completions", cast_to=object, body={
                "model": MODEL, "messages": [{"role": "user", "content": "{}"}], **fields})  # fmt: skip
        name = next(iter(fields))
        assert caught.value.param.startswith(name) or message in ("logprobs: true", "0 to 20", "dif", "not served yet")
    assert len(served.lines("asked")) == before


def test_completions_of_texts_and_of_token_ids(served):
    text = json.dumps({"pieces": ["one", " two"]})
    answer = served.client.completions.create(model=MODEL, prompt=[text, text], n=2, logprobs=1)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(i, "one two") for i in range(4)]
    logprobs = answer.choices[0].logprobs
    assert (
        logprobs.tokens == ["one", " two"] and logprobs.text_offset == [0, 3] and logprobs.token_logprobs == [-0.5] * 2
    )
    assert logprobs.top_logprobs == [{"one": -0.5}, {" two": -0.5}] and answer.object == "text_completion"
    assert served.asked()["settings"]["max_tokens"] == 16 and served.asked()["settings"]["alternatives"] == 1
    pieces = list(served.client.completions.create(model=MODEL, prompt=text, stream=True, logprobs=0))
    assert [piece.choices[0].text for piece in pieces] == ["one", " two", ""]
    assert pieces[1].choices[0].logprobs.text_offset == [3] and pieces[-1].choices[0].finish_reason == "stop"
    for prompt in ([], [[]], [1, "a"], [-1], None, {"a": 1}, [["a"]]):
        with pytest.raises(openai.BadRequestError, match="prompt"):
            served.client.completions.create(model=MODEL, prompt=prompt)


def test_a_stream_has_roles_pieces_ends_and_usage(served):
    todo = {"pieces": ["a", "b"], "thoughts": "hm"}
    stream = served.chat(todo=todo, stream=True, n=2, logprobs=True, top_logprobs=2,
                         stream_options={"include_usage": True})  # fmt: skip
    chunks = list(stream)
    deltas = [(choice.index, choice.delta.to_dict(), choice.finish_reason) for one in chunks for choice in one.choices]
    first = {"role": "assistant", "content": "", "refusal": None}
    assert deltas == [
        (0, first, None),
        (1, first, None),
        *[(0, delta, None) for delta in ({"content": "a"}, {"content": "b"}, {"reasoning_content": "hm"})],
        (0, {}, "stop"),
        *[(1, delta, None) for delta in ({"content": "a"}, {"content": "b"}, {"reasoning_content": "hm"})],
        (1, {}, "stop"),
    ]
    assert not chunks[-1].choices and chunks[-1].usage.total_tokens == 11 and chunks[0].usage is None
    assert len({chunk.id for chunk in chunks}) == 1
    token = chunks[2].choices[0].logprobs.content[0]
    assert token.token == "a" and token.bytes == [97] and [one.logprob for one in token.top_logprobs] == [-0.5, -0.5]


def test_a_silent_stream_has_comments(served, monkeypatch):
    monkeypatch.setattr("jaxft.serving.endpoints.answers.BEAT_SECONDS", 0.05)
    messages = [{"role": "user", "content": json.dumps({"pieces": ["a"], "pause": 0.3})}]
    with served.client.chat.completions.with_streaming_response.create(
        model=MODEL, messages=messages, stream=True
    ) as response:
        lines = list(response.iter_lines())
    assert response.headers["content-type"].startswith("text/event-stream")
    assert ": waiting" in lines and [line for line in lines if line][-1] == "data: [DONE]"
    assert all(line.startswith(("data: {", ": ", "data: [DONE]")) for line in lines if line)


def test_calls_of_tools_whole_and_in_a_stream(served):
    calls = [{"name": "weather", "arguments": '{"city": "X"}'}, {"name": "weather", "arguments": "{}"}]
    todo = {"pieces": [], "calls": calls, "reason": "tool_calls"}
    choice = served.chat(todo=todo, tools=[WEATHER], tool_choice="auto").choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert [call.function.arguments for call in choice.message.tool_calls] == ['{"city": "X"}', "{}"]
    assert len({call.id for call in choice.message.tool_calls}) == 2 and served.asked()["tools"] == [WEATHER]
    with served.client.chat.completions.stream(
        model=MODEL, messages=[{"role": "user", "content": json.dumps(todo)}], tools=[WEATHER]
    ) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls" and final.message.tool_calls[0].function.name == "weather"
    served.chat(tools=[WEATHER], tool_choice="none")
    assert served.asked()["tools"] == []


def test_the_error_classes_of_the_sdk(served):
    with pytest.raises(openai.NotFoundError, match="Did you mean 'tiny'") as caught:
        served.chat(model="tinny")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        served.chat(todo={"refuse": "context_length_exceeded"})
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):
        list(served.chat(todo={"refuse": "context_length_exceeded"}, stream=True))
    with pytest.raises(openai.AuthenticationError):
        served.chat(served.running.client("sk-none"))
    from jaxft.serving.storage.database import Database
    from jaxft.serving.storage.keys import add_key

    db = Database(served.running.state / "state.sqlite3")
    trains, answers = add_key(db, "t", ["train"]), add_key(db, "a", ["answer"])
    db.close()
    with pytest.raises(openai.PermissionDeniedError, match="scope answer"):
        served.chat(served.running.client(trains))
    assert served.chat(served.running.client(answers)).choices
    with pytest.raises(openai.APIStatusError) as caught:
        served.client.post("/chat/completions", cast_to=object, body={"a": "x" * 5 * 2**20})
    assert caught.value.status_code == 413


def test_async_clients_and_many_at_once(served):
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=served.running.url, api_key=served.running.key, max_retries=0) as client:
            messages = [{"role": "user", "content": json.dumps({"wait": True})}]
            create = client.chat.completions.create
            calls = [asyncio.create_task(create(model=MODEL, messages=messages)) for _ in range(12)]
            while sum(call.done() for call in calls) < 8:
                await asyncio.sleep(0.01)
            (served.folder / "go").touch()
            return await asyncio.gather(*calls, return_exceptions=True)

    try:
        results = asyncio.run(ask())
    finally:
        (served.folder / "go").unlink(missing_ok=True)
    refused = [one for one in results if isinstance(one, Exception)]
    # Of one key, 2 slots and half of the queue of 4.
    assert len(refused) == 8 and all(isinstance(one, openai.RateLimitError) for one in refused)
    assert all(one.choices[0].message.content == "Hello there" for one in results if not isinstance(one, Exception))
    assert 1 <= int(refused[0].response.headers["retry-after"]) <= 60 and "key" in str(refused[0])
    assert served.engine()["open"] == 0


def test_requests_of_clients_that_are_gone_are_cancelled(served):
    before = len(served.lines("cancelled"))
    with pytest.raises(openai.APITimeoutError):
        served.chat(served.running.client(timeout=0.3), todo={"wait": True})
    wait_for(lambda: len(served.lines("cancelled")) == before + 1, "the cancellation of a plain request")
    stream = served.chat(todo={"pieces": ["a"], "wait": True}, stream=True)
    assert next(iter(stream)).choices[0].delta.role == "assistant"
    stream.close()
    wait_for(lambda: len(served.lines("cancelled")) == before + 2, "the cancellation of a stream")
    wait_for(lambda: served.engine()["open"] == 0, "the end of the cancelled requests")


def test_an_engine_that_dies_ends_its_answers_and_is_started_anew(tmp_path):
    with serving(tmp_path) as running:
        served = Served(running, tmp_path)
        job = create(served.client, rows(steps=2, wait=1))
        until(served.client, job.id, "running")
        stream = served.chat(todo={"die": True}, stream=True)
        with pytest.raises(openai.APIError, match="ended before"):
            list(stream)
        assert served.chat().choices[0].message.content == "Hello there"
        assert len(served.lines("starts")) == 2 and served.engine()["deaths"] == 1
        with pytest.raises(openai.InternalServerError) as caught:
            served.chat(todo={"die": True})
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"] == "1"
        with pytest.raises(openai.InternalServerError, match="started anew"):  # a pause after the second death
            served.chat()
        (running.state / "jobs" / job.id / "go").touch()
        assert until(served.client, job.id, "succeeded").jaxft["deaths"] == 0, "no job is touched"


def test_a_model_that_cannot_be_loaded_is_no_error_that_clients_repeat(tmp_path):
    (tmp_path / "broken").touch()
    with serving(tmp_path) as running:
        served = Served(running, tmp_path)
        for _ in range(2):
            with pytest.raises(openai.BadRequestError, match="cannot be loaded") as caught:
                served.chat()
            assert caught.value.code == "model_not_loadable" and str(tmp_path) not in str(caught.value)
        assert len(served.lines("starts")) == 1


def test_open_streams_end_when_the_server_stops(tmp_path):
    with serving(tmp_path) as running:
        served = Served(running, tmp_path)
        todo = {"pieces": ["a", "b", "c"], "pause": 0.1}
        stream, hanging = served.chat(todo=todo, stream=True), served.chat(todo={"wait": True}, stream=True)
        pieces, ended = iter(stream), []

        def hang() -> None:
            try:
                list(hanging)
            except openai.APIError as error:
                ended.append(error)

        thread = threading.Thread(target=hang)
        next(pieces), thread.start()
        running.stop()
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == "abc"
        thread.join(60)
        assert "server stopped" in str(ended[0]), "one that does not end is told so"
        with pytest.raises(openai.APIError):
            served.chat()
