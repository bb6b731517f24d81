"""Lists as the protocol has them: a page after an id, in the order of a counter of the database."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from jaxft.serving.http.bodies import query_choice, query_number
from jaxft.serving.http.errors import bad_request
from jaxft.serving.storage.database import Database, Row


@dataclass(frozen=True)
class Listing:
    """Rows of a table with columns `n` and `id`. where: a condition with `values`; id: the column that pages go by."""

    table: str
    where: str
    values: tuple[Any, ...] = ()
    id: str = "id"


def read_page(
    db: Database, request: Request, listing: Listing, *, limit: int, most: int, show: Callable[[Row], dict[str, Any]]
) -> dict[str, Any]:
    """One page, newest first unless the query has `order=asc`. limit: if the query has none. most: that it may ask for.

    Raises ApiError 400 for an unknown `after`, and for a limit or an order that is none.
    """
    size = query_number(request, "limit", limit, most)
    order = query_choice(request, "order", ("desc", "asc"), "desc")
    condition, values = listing.where, list(listing.values)
    after = request.query_params.get("after")
    if after is not None:
        row = db.one(f"SELECT n FROM {listing.table} WHERE {listing.id} = ? AND {listing.where}", (after, *values))
        if row is None:
            raise bad_request(f"There is nothing with the id {after[:80]!r} in this list.", "after")
        condition += f" AND n {'<' if order == 'desc' else '>'} ?"
        values.append(row["n"])
    sql = f"SELECT * FROM {listing.table} WHERE {condition} ORDER BY n {order} LIMIT ?"
    rows = db.all(sql, (*values, size + 1))
    return as_list([show(row) for row in rows[:size]], has_more=len(rows) > size)


def as_list(items: Sequence[dict[str, Any]], *, has_more: bool = False) -> dict[str, Any]:
    """A list object."""
    return {
        "object": "list",
        "data": list(items),
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
        "has_more": has_more,
    }
