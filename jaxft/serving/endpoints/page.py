"""GET / and /page/NAME: the page for browsers. It needs no key, since it holds no data: it asks for all of it."""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jaxft.assets import ASSETS

FOLDER = ASSETS / "serve"
START = "index.html"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Rows and answers are the text of strangers: nothing runs but the page's own files, and nothing else is reached.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


@dataclass(frozen=True)
class Asset:
    """A file of the page. tag: changes with its content."""

    content: bytes
    type: str
    tag: str


@functools.cache
def assets() -> Mapping[str, Asset]:
    """The files of the page by the paths that they are served at."""
    out = {}
    for path in sorted(FOLDER.iterdir()):
        content = path.read_bytes()
        tag = hashlib.sha256(content).hexdigest()[:32]
        where = "/" if path.name == START else f"/page/{path.name}"
        out[where] = Asset(content, TYPES[path.suffix], f'"{tag}"')
    return out


async def answer(request: Request) -> Response:
    """A file of the page; 304 if the browser has it."""
    asset = assets()[request.url.path]
    headers = {**HEADERS, "etag": asset.tag}
    if request.headers.get("if-none-match") == asset.tag:
        return Response(status_code=304, headers=headers)
    return Response(asset.content, media_type=asset.type, headers=headers)


def routes() -> list[Route]:
    """A route for every file."""
    return [Route(path, answer, methods=["GET"]) for path in assets()]
