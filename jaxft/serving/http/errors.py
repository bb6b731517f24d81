"""Errors of requests in the protocol's shape, which the SDK turns into its own classes."""

import errno
import sqlite3
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jaxft.errors import did_you_mean

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ApiError(Exception):
    """A request that is refused. param: the field that is wrong. code: for programs. headers: of the answer.

    The SDK repeats what is answered with 408, 409, 429 or 5xx, so none of them is for what stays wrong.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400 for a field that is wrong."""
    return ApiError(400, message, param=param, code=code)


def no_such(what: str, id: str, code: str, known: Iterable[str] = ()) -> ApiError:
    """404 for an id, with the nearest that exists among `known`."""
    return ApiError(404, f"There is no {what} {id[:200]!r}.{did_you_mean(id[:200], known)}", code=code)


def disk_error(error: OSError, what: str) -> ApiError:
    """400 for a full disk. Raises any other error of the operating system again, which is the server's to mend."""
    if error.errno not in FULL:
        raise error
    return disk_full(what)


def disk_full(what: str) -> ApiError:
    """400, and not 507 or another that clients repeat: it stays full until somebody makes room."""
    return bad_request(f"{what}: the disk of the server is full. Delete files or models.", code="insufficient_storage")


def error_body(error: ApiError) -> dict[str, Any]:
    """The error as the protocol has it."""
    kind = {429: "rate_limit_error", 503: "server_error", 500: "server_error"}.get(
        error.status, "invalid_request_error"
    )
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def error_response(error: ApiError) -> Response:
    """The answer to a refused request."""
    return JSONResponse(error_body(error), error.status, error.headers)


async def answer_api_error(request: Request, error: Exception) -> Response:
    """The handler of ApiError."""
    if not isinstance(error, ApiError):
        raise error
    return error_response(error)


async def answer_http_error(request: Request, error: Exception) -> Response:
    """The handler of what the router refuses: an unknown path, or a method that a path does not have."""
    if not isinstance(error, HTTPException):
        raise error
    if error.status_code == 404:
        return error_response(ApiError(404, f"Unknown request: {request.method} of this path", code="unknown_url"))
    code = "method_not_allowed" if error.status_code == 405 else None
    return error_response(ApiError(error.status_code, str(error.detail), code=code, headers=error.headers))


async def answer_database_error(request: Request, error: Exception) -> Response:
    """The handler of errors of the database: a full disk is told, anything else is an error of the server."""
    if not isinstance(error, sqlite3.OperationalError) or "full" not in str(error):
        raise error
    return error_response(disk_full("Nothing was changed"))


async def answer_failure(request: Request, error: Exception) -> Response:
    """The handler of an error of the program. Its traceback goes to the log alone."""
    id = request.scope.get("request_id", "")
    return error_response(ApiError(500, f"The server failed. Its log has the cause under {id}.", code="internal_error"))
