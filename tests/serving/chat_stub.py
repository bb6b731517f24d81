"""POST /v1/chat/completions as the protocol streams it, without a model: the answer is the prompt, token by token."""

import asyncio
import json
import math
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from jaxft.serving.endpoints.table import Endpoint
from jaxft.serving.http.errors import no_such

ANSWERED: list[dict[str, object]] = []  # bodies of requests


async def answer(request: Request) -> Response:
    """Refuses the model `none`; the prompt `fail` breaks off, and `wait` never ends."""
    body = json.loads(await request.body())
    ANSWERED.append(body)
    if body["model"] == "none":
        raise no_such("model", "none", "model_not_found")
    return StreamingResponse(_pieces(body), media_type="text/event-stream")


async def _pieces(body: dict[str, object]) -> AsyncIterator[str]:
    prompt = body["messages"][-1]["content"]
    yield _chunk(body, {"role": "assistant", "content": ""})
    yield ": still there\n\n"
    for n, token in enumerate(prompt.split(" ")):
        text = f"{token} "
        share = (0.95, 0.7, 0.4, 0.2, 0.01)[n % 5]
        entry = {"token": text, "logprob": math.log(share), "bytes": list(text.encode()), "top_logprobs": []}
        yield _chunk(body, {"content": text}, logprobs={"content": [entry], "refusal": None})
        while token == "wait":
            await asyncio.sleep(0.05)
            yield ": still there\n\n"
        if token == "fail":
            yield f"data: {json.dumps({'error': {'message': 'The engine has died', 'type': 'server_error'}})}\n\n"
            return
    yield _chunk(body, {}, reason="stop")
    words = len(prompt.split(" "))
    usage = {"prompt_tokens": 9, "completion_tokens": words, "total_tokens": 9 + words}
    yield f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"


def _chunk(body: dict[str, object], delta: object, *, logprobs: object = None, reason: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": body["model"], "choices": [choice]}
    return f"data: {json.dumps(chunk)}\n\n"


STUB = Endpoint("POST", "/chat/completions", answer, ("answer",))
