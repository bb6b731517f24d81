"""The objects of answers as the protocol has them, whole and in pieces."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from jaxft.serving.storage.state import new_id, now

Object = dict[str, Any]


@dataclass
class Choice:
    """One answer, as it has come so far. logprobs: of its tokens, as the engine tells them. calls: of tools."""

    text: str = ""
    thoughts: str = ""
    logprobs: list[Object] = field(default_factory=list)
    calls: list[Object] = field(default_factory=list)
    reason: str | None = None

    def add(self, message: Mapping[str, Any]) -> None:
        """Adds a piece, or the end, that the engine told."""
        self.text += message.get("text", "")
        self.thoughts += message.get("thoughts", "")
        self.logprobs += message.get("logprobs", ())
        if message["kind"] == "ended":
            self.calls, self.reason = calls_of(message), message["reason"]


class Shape(Protocol):
    """How an endpoint shows answers."""

    def first(self, index: int) -> Object | None:
        """The first piece of an answer, before its text; None if it has none."""

    def piece(self, message: Mapping[str, Any]) -> Object:
        """The choice in a chunk, of a piece that the engine told."""

    def last(self, message: Mapping[str, Any], choice: Choice) -> list[Object]:
        """The choices in the chunks that end an answer."""

    def choice(self, index: int, choice: Choice) -> Object:
        """A whole answer."""

    def envelope(self, *, chunk: bool) -> Object:
        """All of the object but its choices and usage."""


def usage_of(message: Mapping[str, Any]) -> Object:
    """The counts of tokens, of what the engine told at the end of all answers."""
    prompt, answer = message["prompt_tokens"], message["completion_tokens"]
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def calls_of(message: Mapping[str, Any]) -> list[Object]:
    """The calls of tools with which an answer ended, each with an id of its own."""
    return [
        {"id": new_id("call_"), "type": "function", "function": {"name": one["name"], "arguments": one["arguments"]}}
        for one in message.get("calls", ())
    ]


class ChatShape:
    """The objects of chat/completions. model: as the client named it."""

    def __init__(self, model: str, *, logprobs: bool) -> None:
        self._model, self._logprobs = model, logprobs
        self._id, self._created = new_id("chatcmpl-"), now()

    def first(self, index: int) -> Object | None:
        return _chat_chunk(index, {"role": "assistant", "content": "", "refusal": None})

    def piece(self, message: Mapping[str, Any]) -> Object:
        delta: Object = {}
        if message.get("thoughts"):
            delta["reasoning_content"] = message["thoughts"]
        if message.get("text") or not delta:
            delta["content"] = message.get("text", "")
        return _chat_chunk(message["index"], delta, self._shown(message.get("logprobs", ())))

    def last(self, message: Mapping[str, Any], choice: Choice) -> list[Object]:
        calls = [{"index": number, **call} for number, call in enumerate(choice.calls)]
        before = [_chat_chunk(message["index"], {"tool_calls": calls})] if calls else []
        return [*before, {**_chat_chunk(message["index"], {}), "finish_reason": choice.reason}]

    def choice(self, index: int, choice: Choice) -> Object:
        content = choice.text if choice.text or not choice.calls else None
        message: Object = {"role": "assistant", "content": content, "refusal": None}
        message |= {"reasoning_content": choice.thoughts} if choice.thoughts else {}
        message |= {"tool_calls": choice.calls} if choice.calls else {}
        logprobs = self._shown(choice.logprobs)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.reason}

    def envelope(self, *, chunk: bool) -> Object:
        kind = "chat.completion.chunk" if chunk else "chat.completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _shown(self, logprobs: Sequence[Mapping[str, Any]]) -> Object | None:
        if not self._logprobs:
            return None
        content = [{**_token(one), "top_logprobs": [_token(other) for other in one.get("top", ())]} for one in logprobs]
        return {"content": content, "refusal": None}


class CompletionShape:
    """The objects of completions. model: as the client named it."""

    def __init__(self, model: str, *, logprobs: bool) -> None:
        self._model, self._logprobs = model, logprobs
        self._id, self._created = new_id("cmpl-"), now()
        self._offsets: dict[int, int] = {}  # characters of each answer that were shown

    def first(self, index: int) -> Object | None:
        return None

    def piece(self, message: Mapping[str, Any]) -> Object:
        index, text = message["index"], message.get("text", "")
        start = self._offsets.get(index, 0)
        self._offsets[index] = start + len(text)
        return self._choice(index, text, message.get("logprobs", ()), None, start)

    def last(self, message: Mapping[str, Any], choice: Choice) -> list[Object]:
        return [self._choice(message["index"], "", (), choice.reason, len(choice.text))]

    def choice(self, index: int, choice: Choice) -> Object:
        return self._choice(index, choice.text, choice.logprobs, choice.reason, 0)

    def envelope(self, *, chunk: bool) -> Object:
        return {"id": self._id, "object": "text_completion", "created": self._created, "model": self._model}

    def _choice(
        self, index: int, text: str, logprobs: Sequence[Mapping[str, Any]], reason: str | None, start: int
    ) -> Object:
        shown = _of_completion(logprobs, start) if self._logprobs else None
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": reason}


def _chat_chunk(index: int, delta: Object, logprobs: Object | None = None) -> Object:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def _token(one: Mapping[str, Any]) -> Object:
    return {name: one[name] for name in ("token", "logprob", "bytes")}


def _of_completion(logprobs: Sequence[Mapping[str, Any]], start: int) -> Object:
    """The older form: columns. start: where the text of the first token begins in the answer."""
    offsets = []
    for one in logprobs:
        offsets.append(start)
        start += len(one["token"])
    return {
        "tokens": [one["token"] for one in logprobs],
        "token_logprobs": [one["logprob"] for one in logprobs],
        "top_logprobs": [{other["token"]: other["logprob"] for other in one.get("top", ())} for one in logprobs],
        "text_offset": offsets,
    }


def whole(shape: Shape, choices: Sequence[Choice], usage: Object) -> Object:
    """The object of all answers."""
    shown = [shape.choice(index, choice) for index, choice in enumerate(choices)]
    return {**shape.envelope(chunk=False), "choices": shown, "usage": usage, "system_fingerprint": None}


def chunk(shape: Shape, choices: Sequence[Object], usage: Object | None, *, with_usage: bool) -> str:
    """A chunk as a server-sent event. with_usage: whether chunks have the field `usage`, null but in the last one."""
    body = {**shape.envelope(chunk=True), "choices": list(choices), "system_fingerprint": None}
    return event(body | ({"usage": usage} if with_usage else {}))


def event(body: Object) -> str:
    """An object as a server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
