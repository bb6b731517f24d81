"""Requests of the server on their way through the engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxft.data.chat.reasoning import arrange_thoughts
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import DataError, JaxftError, ModelError
from jaxft.generation.request import Request
from jaxft.generation.settings import Sampling
from jaxft.generation.text import encode_prompt
from jaxft.serving.engine.adapter_slots import AdapterSlot, AdapterSlots
from jaxft.serving.engine.choice import Answering, Choice, Tell
from jaxft.serving.engines.spec import NOT_BY_ROW


class Refused(Exception):
    """A request that cannot be answered. code, param: as in the protocol."""

    def __init__(self, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


@dataclass
class _Open:
    """A request that is being answered. ids: of its answers in the engine."""

    prompt_tokens: int
    choices: list[Choice] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    left: int = 0


class Requests:
    """Hands requests to an engine, and tells what becomes of them. tell: takes messages for the server."""

    def __init__(self, slots: AdapterSlots, tell: Tell) -> None:
        self._slots, self._tell, self._engine = slots, tell, slots.engine
        self._waiting: dict[str, Mapping[str, Any]] = {}  # for an adapter slot, oldest first
        self._open: dict[str, _Open] = {}
        self._ids = 0

    def take(self, message: Mapping[str, Any]) -> None:
        """Takes a request, or cancels one."""
        if message["kind"] == "answer":
            self._waiting[message["id"]] = message
            self._start(message)
        elif message["kind"] == "cancel":
            self._waiting.pop(message["id"], None)
            open_ = self._open.pop(message["id"], None)
            for id in () if open_ is None else open_.ids:
                self._engine.cancel(id)

    def step(self) -> bool:
        """Works for a moment; False if there is nothing to do."""
        for message in list(self._waiting.values()):
            self._start(message)
        worked = self._engine.step()
        for open_ in list(self._open.values()):
            for choice in open_.choices:
                choice.flush()
        return worked

    def _start(self, message: Mapping[str, Any]) -> None:
        """Begins to answer, unless it has to wait for a place."""
        id = message["id"]
        try:
            slot = self._slot_of(message)
            if slot is None:
                return
            del self._waiting[id]
            self._submit(message, slot)
        except Refused as error:
            self._waiting.pop(id, None)
            refused = {"id": id, "kind": "refused", "message": str(error), "code": error.code, "param": error.param}
            self._tell(refused)

    def _slot_of(self, message: Mapping[str, Any]) -> AdapterSlot | None:
        adapter = message["adapter"]
        if adapter is None:
            return self._slots.base
        if not self._engine.num_adapters:
            raise Refused("This base takes no adapters beside each other.", NOT_BY_ROW)
        try:
            return self._slots.slot_of(adapter["id"], adapter["folder"])
        except ModelError as error:
            print(f"{adapter['id']}: {error}", flush=True)
            raise Refused("This adapter answers alone.", NOT_BY_ROW) from error
        except (JaxftError, OSError) as error:
            print(f"{adapter['id']}: {error}", flush=True)
            text = f"The model {adapter['id']!r} cannot be loaded. The log of the server says why."
            raise Refused(text, "model_not_loadable", "model") from error

    def _submit(self, message: Mapping[str, Any], slot: AdapterSlot) -> None:
        prompts = self._prompts(message, slot.tokenizer)
        settings = message["settings"]
        most = self._most_tokens(prompts, settings["max_tokens"], message["kind_of"])
        sampling = Sampling(
            max_new_tokens=most,
            **{
                name: settings[name]
                for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
            },
        )
        answering = Answering(
            id=message["id"],
            tokenizer=slot.tokenizer,
            is_chat=message["kind_of"] == "chat",
            stop=tuple(settings["stop"]),
            logprobs=settings["logprobs"],
            tools=message["tools"],
            calls=slot.calls if message["tools"] else None,
        )
        open_ = self._open[message["id"]] = _Open(prompt_tokens=sum(map(len, prompts)))
        self._tell({"id": message["id"], "kind": "begun"})
        requests = []
        for number, prompt in enumerate(prompts):
            for stream in range(settings["n"]):
                choice = Choice(
                    answering, number * settings["n"] + stream, prompt, self._tell, lambda _: self._end(answering.id)
                )
                self._ids += 1
                open_.choices.append(choice)
                open_.ids.append(self._ids)
                requests.append(
                    Request(
                        id=self._ids,
                        prompt=tuple(prompt),
                        sampling=sampling,
                        stream=stream,
                        adapter=slot.number,
                        alternatives=settings["alternatives"],
                        on_token=choice.on_token,
                        on_end=choice.on_end,
                    )
                )
        open_.left = len(requests)
        for request in requests:
            self._engine.submit(request)

    def _end(self, id: str) -> None:
        """The end of one of the answers to a request."""
        open_ = self._open.get(id)
        if open_ is None:
            return  # it was cancelled
        open_.left -= 1
        if not open_.left:
            del self._open[id]
            tokens = sum(choice.tokens for choice in open_.choices)
            counts = {"prompt_tokens": open_.prompt_tokens, "completion_tokens": tokens}
            self._tell({"id": id, "kind": "done", **counts})

    def _prompts(self, message: Mapping[str, Any], tokenizer: Tokenizer) -> list[list[int]]:
        if message["tools"] and "tools" not in tokenizer.template_variables:
            text = "The chat template of this model shows no tools to it: leave tools out."
            raise Refused(text, "unsupported_parameter", "tools")
        try:
            if message["kind_of"] == "chat":
                prompts = [_chat_prompt(message, tokenizer)]
            else:
                prompts = [encode_prompt(tokenizer, one) if isinstance(one, str) else one for one in message["prompts"]]
        except DataError as error:
            text = str(error).replace(tokenizer.name or "\0", "of this model")
            raise Refused(f"The prompt cannot be read: {text}", "invalid_prompt", _param(message)) from error
        for prompt in prompts:
            if not prompt:
                raise Refused("The prompt is empty: a model continues at least one token.", "invalid_prompt", "prompt")
            if not all(token < self._engine.vocab for token in prompt):
                raise Refused(f"Token ids are below {self._engine.vocab:,} here.", "invalid_prompt", "prompt")
        return prompts

    def _most_tokens(self, prompts: Sequence[Sequence[int]], wanted: int | None, kind: str) -> int:
        """Most tokens of an answer."""
        longest, room = max(map(len, prompts)), self._engine.request_length
        if longest + (wanted or 1) > room:
            answer = "" if wanted is None else f" and its answer may take {wanted:,}"
            raise Refused(
                f"The prompt has {longest:,} tokens{answer}, and this server has room for {room:,} together. Shorten "
                "the prompt, or ask for fewer tokens.",
                "context_length_exceeded",
                "messages" if kind == "chat" else "prompt",
            )
        return room - longest if wanted is None else wanted


def _param(message: Mapping[str, Any]) -> str:
    return "messages" if message["kind_of"] == "chat" else "prompt"


def _chat_prompt(message: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
    """The prompt as training renders it. Raises DataError for messages that the template refuses."""
    messages = arrange_thoughts(message["messages"], "keep", tokenizer.chat_template)
    tools = {"tools": message["tools"]} if message["tools"] else {}
    return encode_prompt(tokenizer, list(messages), **tools, **message["variables"])
