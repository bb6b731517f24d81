"""Routes as entries of a table: which path, who may, what answers."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jaxft.serving.http.access import check_scope

Handler = Callable[[Request], Awaitable[Response]]
PREFIX = "/v1"


@dataclass(frozen=True)
class Endpoint:
    """One method of one path below /v1. scopes: a key needs one of them; none: any key will do."""

    method: str
    path: str
    handler: Handler
    scopes: tuple[str, ...] = ("train",)

    def route(self) -> Route:
        """The route, whose handler is called with a key that may."""

        async def answer(request: Request) -> Response:
            if self.scopes:
                check_scope(request.scope["key"], self.scopes)
            return await self.handler(request)

        return Route(PREFIX + self.path, answer, methods=[self.method])
