"""JSON bodies and query parameters, read within bounds, and their fields checked one by one."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from starlette.requests import Request

from jaxft.errors import did_you_mean
from jaxft.files.strict_json import parse_json
from jaxft.serving.http.errors import ApiError, bad_request

MOST_BYTES = 4 * 2**20  # of a JSON body
SHOWN = 80  # characters of a client's text in a message
NO_BODY = ("", "0")


async def read_bytes(request: Request, most: int = MOST_BYTES) -> bytes:
    """The body. Raises ApiError 413 for a longer one, before it is read where its length is announced."""
    refusal = ApiError(413, f"The body is longer than {most:,} bytes.", code="too_large")
    announced = request.headers.get("content-length", "0")
    if not announced.isascii() or not announced.isdigit():
        raise bad_request("The Content-Length is no number.")
    if int(announced[:20]) > most:
        raise refusal
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > most:
            raise refusal
        pieces.append(piece)
    return b"".join(pieces)


async def read_object(request: Request) -> tuple[dict[str, Any], bytes]:
    """(the JSON object of the body, its bytes); of an empty body, no fields. Raises ApiError 400, 413 or 415."""
    content = await read_bytes(request)
    if not content:
        return {}, content
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"The body must be application/json, not {kind[:SHOWN]!r}.", code="unsupported_media_type")
    try:
        value = parse_json(content, finite=True)
    except ValueError as error:
        raise bad_request(f"The body is no valid JSON: {str(error)[:300]}") from error
    if not isinstance(value, dict):
        raise bad_request("The body must be a JSON object.")
    return value, content


def refuse_unknown(values: Mapping[str, Any], known: Iterable[str], within: str = "") -> None:
    """Raises ApiError 400 for a field that is not known and not null, with the nearest one that is."""
    names = list(known)
    for name, value in values.items():
        if name not in names and value is not None:
            hint = did_you_mean(name[:SHOWN], names)
            raise bad_request(f"Unknown field {within}{name[:SHOWN]!r}.{hint}", within + name[:SHOWN])


def text_field(
    values: Mapping[str, Any], name: str, *, required: bool = False, most: int = 200, within: str = ""
) -> str | None:
    """The text of a field. Raises ApiError 400 if it is something else, too long, or missing."""
    value = values.get(name)
    if value is None:
        if required:
            raise bad_request(f"The field {within}{name} is missing.", within + name)
        return None
    if not isinstance(value, str) or len(value) > most:
        raise bad_request(f"{within}{name} must be a text of at most {most:,} characters.", within + name)
    return value


def whole_field(values: Mapping[str, Any], name: str, low: int, high: int, within: str = "") -> int | None:
    """The whole number of a field. Raises ApiError 400 if it is something else or outside of the bounds."""
    value = values.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise bad_request(f"{within}{name} must be a whole number from {low:,} to {high:,}.", within + name)
    return value


def positive_field(values: Mapping[str, Any], name: str, most: float, within: str = "") -> float | None:
    """The number of a field. Raises ApiError 400 if it is something else, not above 0, or above `most`."""
    value = values.get(name)
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not 0 < value <= most:
        raise bad_request(f"{within}{name} must be a number above 0, and at most {most:g}.", within + name)
    return float(value)


def number_field(values: Mapping[str, Any], name: str, low: float, high: float, default: float) -> float:
    """The number of a field. Raises ApiError 400 if it is something else or outside of the bounds."""
    value = values.get(name)
    if value is None:
        return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise bad_request(f"{name} must be a number from {low:g} to {high:g}.", name)
    return float(value)


def object_field(values: Mapping[str, Any], name: str, within: str = "") -> dict[str, Any]:
    """The object of a field; empty if it is missing. Raises ApiError 400 if it is something else."""
    value = values.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad_request(f"{within}{name} must be an object.", within + name)
    return value


def refuse_controls(text: str, name: str) -> str:
    """The text. Raises ApiError 400 if it has control characters, which labels in logs and headers must not have."""
    if any(ord(one) < 32 or ord(one) == 127 for one in text):
        raise bad_request(f"{name} has control characters.", name)
    return text


def query_number(request: Request, name: str, default: int, high: int, low: int = 1) -> int:
    """A whole number from `low` to `high` of the query. Raises ApiError 400."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or not low <= int(text[:12]) <= high:
        raise bad_request(f"{name} must be a whole number from {low} to {high:,}.", name)
    return int(text)


def query_choice(request: Request, name: str, choices: Sequence[str], default: str) -> str:
    """One of the choices, from the query. Raises ApiError 400."""
    text = request.query_params.get(name, default)
    if text not in choices:
        raise bad_request(f"{name} must be one of {', '.join(choices)}.", name)
    return text
