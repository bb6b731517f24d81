"""What an engine's process makes of requests and tokens, with a stand-in for the model that says a given text."""

import json
from typing import Any

import pytest

from jaxft.assets import ASSETS
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.errors import CheckpointError, ModelError
from jaxft.generation.called_tools import CallForm
from jaxft.serving.engine.adapter_slots import AdapterSlot, AdapterSlots
from jaxft.serving.engine.logprobs import shown_token
from jaxft.serving.engine.requests import Requests

ROOM = 4000  # tokens of a prompt and its answer
WEATHER = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}
SETTINGS = {
    "max_tokens": None, "n": 1, "temperature": 1.0, "top_p": 1.0, "top_k": None, "min_p": None,
    "repetition_penalty": 1.0, "seed": 0, "stop": [], "logprobs": False, "alternatives": 0,
}  # fmt: skip


class SayingEngine:
    """Answers every request with the tokens of `text`, four at a step. refused: folders that are no LoRA by row."""

    vocab, request_length, num_adapters = 259, ROOM, 2

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.text = tokenizer, "Hello"
        self.requests: list[Any] = []
        self.written: list[tuple[int, str]] = []
        self.stop_ids = tokenizer.stop_ids

    def submit(self, request: Any) -> None:
        self.requests.append(request)

    def cancel(self, id: int) -> None:
        for request in [one for one in self.requests if one.id == id]:
            request.cancelled = True
            self.requests.remove(request)
            request.on_end(request)

    def step(self) -> bool:
        worked = bool(self.requests)
        tokens = [*self.tokenizer.encode(self.text), min(self.stop_ids)]
        for request in list(self.requests):
            for _ in range(4):
                if not request.ended:
                    request.add(tokens[len(request.tokens)], -0.25, ((65, -0.5), (66, -1.0)), self.stop_ids)
            if request.ended:
                self.requests.remove(request)
                request.on_end(request)
        return worked

    def uses_of(self, number: int) -> int:
        return sum(request.adapter == number for request in self.requests)

    def write_adapter(self, number: int, folder: str) -> None:
        if folder == "dora":
            raise ModelError("it is DoRA. Serve it alone.")
        if folder == "gone":
            raise CheckpointError("there is no gone")
        self.written.append((number, folder))


class Asked:
    """Requests to an engine that says a text, and what the server is told of them."""

    def __init__(self, tokenizer: Any) -> None:
        self.engine, self.told = SayingEngine(tokenizer), list[dict[str, Any]]()
        base = AdapterSlot(0, tokenizer, CallForm.of(tokenizer))
        self.slots = AdapterSlots(self.engine, base, "base")
        self.requests = Requests(self.slots, self.told.append)
        self.ids = 0

    def ask(self, adapter: str | None = None, tools: Any = (), content: str = "hi", **settings: Any) -> str:
        self.ids += 1
        id = f"a{self.ids}"
        folder = None if adapter is None else {"id": adapter, "folder": adapter}
        self.requests.take({
            "id": id, "kind": "answer", "kind_of": "chat", "messages": [{"role": "user", "content": content}],
            "tools": tools, "variables": {}, "prompts": [], "settings": SETTINGS | settings, "adapter": folder,
        })  # fmt: skip
        return id

    def answers(self, id: str) -> list[dict[str, Any]]:
        """What was told of a request, once there is no more to do."""
        while self.requests.step():
            pass
        return [message for message in self.told if message["id"] == id]

    def whole(self, text: str, **fields: Any) -> tuple[str, str, dict[str, Any]]:
        """(text, thoughts, the end) of the only answer, if the model says this."""
        self.engine.text = text
        messages = self.answers(self.ask(**fields))
        pieces = [one for one in messages if one["kind"] == "piece"]
        (end,) = (one for one in messages if one["kind"] == "ended")
        joined = ("".join(one.get(name, "") for one in pieces) for name in ("text", "thoughts"))
        return *joined, end


@pytest.fixture
def asked() -> Asked:
    template = (ASSETS / "chat_templates" / "qwen3.jinja").read_text()
    return Asked(load_tokenizer(str(ASSETS / "smoke")).with_template(template))


def call(**arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': 'weather', 'arguments': arguments})}\n</tool_call>"


def test_calls_come_at_the_end_and_text_and_thoughts_before(asked):
    said = f"<think>\nWhere?\n</think>\n\nI look.\n{call(city='Zürich')}\n{call(city='Bern')}"
    text, thoughts, end = asked.whole(said, tools=[WEATHER])
    assert (text.strip(), thoughts.strip(), end["reason"]) == ("I look.", "Where?", "tool_calls")
    assert [json.loads(one["arguments"])["city"] for one in end["calls"]] == ["Zürich", "Bern"]
    text, _, end = asked.whole(call(city="Bern")[:-20], tools=[WEATHER])
    assert text == call(city="Bern")[:-20] and end["reason"] == "stop" and "calls" not in end
    assert asked.whole(call())[0] == call(), "without tools it is a text"
    assert asked.told[-1]["kind"] == "done" and asked.told[-1]["completion_tokens"] > 30


def test_a_text_comes_in_whole_characters_before_a_stop(asked):
    text, _, end = asked.whole("Aé漢🙂 END and more", stop=["END", "x"])
    assert text == "Aé漢🙂 " and end["reason"] == "stop"
    assert not [one for one in asked.told if "\ufffd" in one.get("text", "")]
    assert (
        asked.whole("0123456789", max_tokens=4)[::2] == ("0123", asked.told[-2])
        and asked.told[-2]["reason"] == "length"
    )


def test_logprobs_are_of_the_tokens_of_the_answer_alone(asked):
    asked.engine.text = "<think>\nno\n</think>\n\naéb STOP"
    messages = asked.answers(asked.ask(logprobs=True, alternatives=2, stop=["STOP"]))
    shown = [one for message in messages for one in message.get("logprobs", ())]
    assert bytes(byte for one in shown for byte in one["bytes"]).decode().strip() == "aéb"
    assert all(one["logprob"] == -0.25 and [top["logprob"] for top in one["top"]] == [-0.5, -1.0] for one in shown)
    tokenizer = asked.slots.base.tokenizer
    assert shown_token(tokenizer, tokenizer.encode("é")[0], float("-inf"))["bytes"] == [0xC3]
    assert shown_token(tokenizer, tokenizer.encode("é")[0], float("-inf"))["logprob"] == -9999.0


def test_prompts_are_rendered_with_tools_and_refused_when_they_do_not_fit(asked):
    id = asked.ask(tools=[WEATHER], max_tokens=8, n=3)
    prompt = asked.slots.base.tokenizer.decode(asked.engine.requests[0].prompt, skip_special_tokens=False)
    assert '"name": "weather"' in prompt and prompt.endswith("<|im_start|>assistant\n")
    assert [request.stream for request in asked.engine.requests] == [0, 1, 2]
    counts = asked.answers(id)[-1]
    tokens = asked.slots.base.tokenizer.encode(prompt)
    assert (counts["prompt_tokens"], counts["completion_tokens"]) == (len(tokens), 3 * len("Hello."))
    refusals = [asked.answers(asked.ask(content="x" * ROOM)), asked.answers(asked.ask(max_tokens=ROOM))]
    assert [(one["kind"], one["code"]) for (one,) in refusals] == [("refused", "context_length_exceeded")] * 2


def test_adapters_share_places_and_the_idle_one_leaves(asked):
    for name in ("a", "b", "a"):
        asked.answers(asked.ask(name))
    assert asked.engine.written == [(1, "a"), (2, "b")]
    asked.answers(asked.ask("c"))
    assert asked.engine.written[-1] == (2, "c") and asked.slots.models == ["a", "c"]
    first, second, third = asked.ask("a"), asked.ask("c"), asked.ask("b")
    assert not [one for one in asked.told if one["id"] == third], "it waits, since both places are in use"
    base = asked.ask()
    assert [one for one in asked.told if one["id"] == base], "others do not wait for it"
    asked.requests.take({"kind": "cancel", "id": first})
    assert asked.answers(third)[-1]["kind"] == "done" and asked.answers(second)[-1]["kind"] == "done"
    assert not [one for one in asked.told if one["id"] == first and one["kind"] != "begun"]
    assert [asked.answers(asked.ask(name))[0]["code"] for name in ("dora", "gone")] == [
        "serve_alone",
        "model_not_loadable",
    ]
    assert asked.answers(asked.ask("b"))[-1]["kind"] == "done"


def test_a_cancelled_request_that_waits_is_forgotten(asked):
    asked.ask("a"), asked.ask("b")
    waiting = asked.ask("c")
    asked.requests.take({"kind": "cancel", "id": waiting})
    assert not asked.answers(waiting) and asked.engine.written == [(1, "a"), (2, "b")]
