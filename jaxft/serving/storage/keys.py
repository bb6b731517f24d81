"""Keys of clients: 256 random bits, of which only the SHA-256 is kept."""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ConfigError, did_you_mean
from jaxft.serving.storage.database import Database, Row
from jaxft.serving.storage.state import new_id, now

SCOPES = ("answer", "train", "admin")
PREFIX = "sk-jaxft-"
USED_EVERY = 60  # seconds between two entries of when a key was used last


@dataclass(frozen=True)
class Key:
    """A key that is valid now. scopes: what it may do; `admin` is everything."""

    id: str
    scopes: frozenset[str]

    def may(self, scopes: Sequence[str]) -> bool:
        """Whether one of the scopes is the key's."""
        return "admin" in self.scopes or bool(self.scopes & set(scopes))


def add_key(db: Database, name: str, scopes: Sequence[str]) -> str:
    """Makes a key and returns it, the only time that it is seen. Raises ConfigError for an unknown scope."""
    for scope in scopes:
        if scope not in SCOPES:
            raise ConfigError(f"{scope!r} is no scope of a key.{did_you_mean(scope, SCOPES)} Known: {list(SCOPES)}")
    if not scopes:
        raise ConfigError(f"a key needs a scope: some of {', '.join(SCOPES)}")
    key = PREFIX + secrets.token_urlsafe(32)
    row = (new_id("key-"), name[:100], _hash(key), ",".join(dict.fromkeys(scopes)), now())
    with db.write() as connection:
        connection.execute("INSERT INTO keys (id, name, hash, scopes, created_at) VALUES (?, ?, ?, ?, ?)", row)
    return key


def key_of(db: Database, key: str) -> Key | None:
    """The key of this text; None if there is none, or it is revoked."""
    row = db.one("SELECT * FROM keys WHERE hash = ? AND revoked_at IS NULL", (_hash(key),))
    if row is None:
        return None
    if now() - (row["last_used_at"] or 0) >= USED_EVERY:
        with db.write() as connection:
            connection.execute("UPDATE keys SET last_used_at = ? WHERE id = ?", (now(), row["id"]))
    return Key(row["id"], frozenset(row["scopes"].split(",")))


def list_keys(db: Database) -> list[dict[str, Any]]:
    """What is known of all keys, oldest first, without the keys."""
    return [_shown(row) for row in db.all("SELECT * FROM keys ORDER BY created_at, id")]


def revoke_key(db: Database, id: str) -> dict[str, Any]:
    """Ends a key, at once. Raises ConfigError for an unknown one."""
    with db.write() as connection:
        connection.execute("UPDATE keys SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL", (now(), id))
    row = db.one("SELECT * FROM keys WHERE id = ?", (id,))
    if row is None:
        raise ConfigError(f"there is no key {id!r}: `jaxft serve keys list` shows the ids")
    return _shown(row)


def _shown(row: Row) -> dict[str, Any]:
    names = ("id", "name", "scopes", "created_at", "last_used_at", "revoked_at")
    return {name: row[name] for name in names}


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
