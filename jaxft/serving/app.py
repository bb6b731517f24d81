"""The application: the table of routes, and the layers around them."""

import sqlite3

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from jaxft.serving.endpoints import answers, files, jobs, models, page, stream, system, uploads
from jaxft.serving.endpoints.table import Endpoint
from jaxft.serving.http import errors
from jaxft.serving.http.access import Access, Allowed
from jaxft.serving.service import Service

HEALTH = "/health"
# Paths that need no key: they hold no data.
OPEN_PATHS = frozenset({HEALTH, *page.assets()})
ENDPOINTS: tuple[Endpoint, ...] = (
    *files.ENDPOINTS, *uploads.ENDPOINTS, *jobs.ENDPOINTS, *models.ENDPOINTS, *answers.ENDPOINTS,
    *stream.ENDPOINTS, *system.ENDPOINTS,
)  # fmt: skip


def make_app(service: Service, port: int) -> Starlette:
    """The application of a server at this port."""
    allowed = Allowed(service.settings.host_names(port), OPEN_PATHS)
    app = Starlette(
        routes=[
            Route(HEALTH, system.health, methods=["GET"]),
            *page.routes(),
            *(endpoint.route() for endpoint in ENDPOINTS),
        ],
        middleware=[Middleware(Access, db=service.state.db, allowed=allowed)],
        exception_handlers={
            errors.ApiError: errors.answer_api_error,
            HTTPException: errors.answer_http_error,
            sqlite3.OperationalError: errors.answer_database_error,
            Exception: errors.answer_failure,
        },
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app
