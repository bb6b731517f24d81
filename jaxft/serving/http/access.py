"""Who may send requests: names of this server, origins of its page, and keys. Every request gets an id and a log line.

These are plain ASGI layers: what is built on starlette's BaseHTTPMiddleware would not see that a client is gone.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxft.serving.http.errors import ApiError, error_response
from jaxft.serving.storage.database import Database
from jaxft.serving.storage.keys import Key, key_of
from jaxft.serving.storage.state import new_id

log = logging.getLogger("jaxft.serving.requests")
Headers = dict[bytes, bytes]


@dataclass(frozen=True)
class Allowed:
    """hosts: names with ports, in lower case, under which the server is reached. open_paths: need no key."""

    hosts: frozenset[str]
    open_paths: frozenset[str]

    def check_names(self, headers: Headers) -> None:
        """Raises ApiError 403 for another Host or Origin: a page of a stranger must not speak to this server."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if host not in self.hosts:
            raise ApiError(
                403, "This server is not known under that name (Host). Start it with --hosts=NAME.", code="unknown_host"
            )
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin.decode("latin-1").lower()).netloc not in self.hosts:
            raise ApiError(403, "Pages of other sites (Origin) may not use this server.", code="unknown_origin")


class RequestIds:
    """Gives every request an id, which the answer has as `x-request-id`, and logs it without any of its content."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        id, started, status = new_id("req_"), time.monotonic(), 500
        scope["request_id"] = id

        async def with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(b"x-request-id", id.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        try:
            await self.app(scope, receive, with_id)
        finally:
            route = getattr(scope.get("route"), "path", "-")
            milliseconds = 1000 * (time.monotonic() - started)
            log.info("%s %s %s %d %.0f ms", id, scope["method"], route, status, milliseconds)


class Access:
    """Refuses requests under other names, from other origins, and without a valid key."""

    def __init__(self, app: ASGIApp, *, db: Database, allowed: Allowed) -> None:
        self.app, self.db, self.allowed = app, db, allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            await self._check(scope)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    async def _check(self, scope: MutableMapping[str, Any]) -> None:
        headers: Headers = dict(scope["headers"])
        self.allowed.check_names(headers)
        if scope["path"] in self.allowed.open_paths:
            return
        kind, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        known = await asyncio.to_thread(key_of, self.db, key.strip()) if kind.lower() == "bearer" and key else None
        if known is None:
            raise ApiError(
                401,
                "The request has no valid key: send `Authorization: Bearer KEY`. `jaxft serve keys add` makes one.",
                code="invalid_api_key",
            )
        scope["key"] = known


def check_scope(key: Key, scopes: tuple[str, ...]) -> None:
    """Raises ApiError 403 if the key has none of the scopes."""
    if not key.may(scopes):
        raise ApiError(
            403, f"This key may not do that: it needs the scope {' or '.join(scopes)}.", code="insufficient_scope"
        )


Handler = Callable[..., Awaitable[Any]]
