"""/v1/chat/completions and /v1/completions: answers of a base or a tuned model, whole or as a stream."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from jaxft.serving.answers import shapes
from jaxft.serving.answers.request import AnswerRequest, parse_chat, parse_completion
from jaxft.serving.answers.shapes import ChatShape, Choice, CompletionShape, Shape
from jaxft.serving.endpoints.table import Endpoint
from jaxft.serving.engines.answer import OpenAnswer
from jaxft.serving.engines.spec import NOT_BY_ROW
from jaxft.serving.engines.target import target_of
from jaxft.serving.http.bodies import read_object
from jaxft.serving.http.errors import ApiError, error_body
from jaxft.serving.service import service_of

ANSWERERS = ("answer",)
BEAT_SECONDS = 10.0  # in which a proxy would end a silent stream
WAITING = ": waiting\n\n"
GONE = 499  # for the log alone: nobody reads it
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
T = TypeVar("T")


class ClientGoneError(Exception):
    """The client has closed its connection."""


async def chat(request: Request) -> Response:
    """Answers to a chat."""
    values, content = await read_object(request)
    wanted = parse_chat(values)
    return await _answer(request, wanted, ChatShape(wanted.model, logprobs=wanted.settings.logprobs), len(content))


async def complete(request: Request) -> Response:
    """Continuations of prompts."""
    values, content = await read_object(request)
    wanted = parse_completion(values)
    shape = CompletionShape(wanted.model, logprobs=wanted.settings.logprobs)
    return await _answer(request, wanted, shape, len(content))


class _Opening:
    """An answer that an engine is to begin, which may take as long as the engine takes to start."""

    def __init__(self, work: Coroutine[Any, Any, OpenAnswer]) -> None:
        self._task = asyncio.ensure_future(work)

    async def within(self, seconds: float | None) -> OpenAnswer | None:
        """The answer once it has begun; None if it has not after so many seconds. Raises ApiError if it is refused."""
        await asyncio.wait((self._task,), timeout=seconds)
        return self._task.result() if self._task.done() else None

    def close(self) -> None:
        """Gives it up, whether it has begun or not. Harmless when called again."""
        if not self._task.cancel() and not self._task.cancelled() and self._task.exception() is None:
            self._task.result().close()


async def _answer(request: Request, wanted: AnswerRequest, shape: Shape, size: int) -> Response:
    opening = _Opening(_opened(request, wanted, size))
    try:
        # A refusal that comes before the first comment line has a status of its own.
        answer = await _unless_gone(request, opening.within(BEAT_SECONDS if wanted.stream else None))
        if wanted.stream:
            return _AnswerStream(opening, wanted, shape)
        if answer is None:
            raise RuntimeError("an answer neither began nor failed")
        choices, end = await _unless_gone(request, _all(answer, wanted))
    except ClientGoneError:
        opening.close()
        return Response(status_code=GONE)
    except BaseException:
        opening.close()
        raise
    opening.close()
    return JSONResponse(shapes.whole(shape, choices, shapes.usage_of(end)))


async def _opened(request: Request, wanted: AnswerRequest, size: int) -> OpenAnswer:
    """The answer, which an engine has begun. Raises ApiError as the engine does."""
    service = service_of(request)
    engines, model, key = service.engines, wanted.model, request.scope["key"].id
    while True:
        target = await asyncio.to_thread(target_of, service.state, service.settings, model, engines.alone)
        answer = engines.open(target, wanted, key=key, size=size)
        try:
            await answer.begin()
        except ApiError as error:
            answer.close()
            if error.code != NOT_BY_ROW or model in engines.alone:
                raise
            engines.alone.add(model)  # and with the next turn, it has an engine of its own
        except BaseException:
            answer.close()
            raise
        else:
            return answer


async def _all(answer: OpenAnswer, wanted: AnswerRequest) -> tuple[list[Choice], Mapping[str, Any]]:
    """(all answers, the counts of their tokens)."""
    choices = [Choice() for _ in range(wanted.choices)]
    async for message in answer.messages():
        if message is None or message["kind"] == "done":
            continue
        choices[message["index"]].add(message)
    if message is None:
        raise RuntimeError("an answer ended without its counts")
    return choices, message


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of the work, which is cancelled when the client closes its connection. Raises ClientGoneError."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watching, working = asyncio.ensure_future(watch()), asyncio.ensure_future(work)
    try:
        await asyncio.wait((watching, working), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for task in (watching, working):
            task.cancel()
        await asyncio.gather(watching, working, return_exceptions=True)


class _AnswerStream(StreamingResponse):
    """Sends the pieces of an answer as they come, and gives the answer up when the client is gone."""

    def __init__(self, opening: _Opening, wanted: AnswerRequest, shape: Shape) -> None:
        super().__init__(_pieces(opening, wanted, shape), media_type="text/event-stream", headers=HEADERS)
        self._opening = opening

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._opening.close()


async def _pieces(opening: _Opening, wanted: AnswerRequest, shape: Shape) -> AsyncIterator[str]:
    choices = [Choice() for _ in range(wanted.choices)]

    def chunk(shown: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        return shapes.chunk(shape, shown, usage, with_usage=wanted.include_usage)

    firsts = [first for index in range(wanted.choices) if (first := shape.first(index)) is not None]
    try:
        while (answer := await opening.within(BEAT_SECONDS)) is None:
            yield WAITING
        for first in firsts:
            yield chunk([first])
        async for message in answer.messages(BEAT_SECONDS):
            if message is None:
                yield WAITING
            elif message["kind"] == "piece":
                choices[message["index"]].add(message)
                yield chunk([shape.piece(message)])
            elif message["kind"] == "ended":
                choice = choices[message["index"]]
                choice.add(message)
                for shown in shape.last(message, choice):
                    yield chunk([shown])
            elif wanted.include_usage:
                yield chunk([], shapes.usage_of(message))
    except ApiError as error:
        yield shapes.event(error_body(error))
        return
    yield "data: [DONE]\n\n"


ENDPOINTS = (
    Endpoint("POST", "/chat/completions", chat, ANSWERERS),
    Endpoint("POST", "/completions", complete, ANSWERERS),
)
