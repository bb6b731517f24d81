"""The SQLite database of a state folder: one connection, which one thread at a time uses."""

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from jaxft.errors import JaxftError
from jaxft.serving.storage.schema import APPLICATION, MIGRATIONS

BUSY_SECONDS = 10.0  # `jaxft serve keys` may write at the same time
Row = sqlite3.Row


class StateError(JaxftError, RuntimeError):
    """A state folder that this server cannot use."""


class Database:
    """A connection in WAL mode that flushes every transaction to the disk.

    Calls of other threads wait for each other, so that there is one writer. `changes` counts the transactions, by which
    a reader sees that there is something new. Raises StateError for a database of another program, of a newer jaxft,
    or a damaged one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._lock = threading.RLock()
        self.changes = 0
        # In autocommit: transactions are begun and ended by `write` alone.
        self._connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        self._connection.row_factory = sqlite3.Row
        try:
            self._open(os.fspath(path))
        except sqlite3.DatabaseError as error:
            self.close()
            raise StateError(
                f"{os.fspath(path)} cannot be used as the database of a server: {error}. Give another folder as "
                "--state, or restore the file from a copy."
            ) from error
        except StateError:
            self.close()
            raise

    def _open(self, path: str) -> None:
        version = int(self._pragma("user_version"))
        application = int(self._pragma("application_id"))
        tables = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables and application != APPLICATION:
            raise StateError(f"{path} is a database of another program. Give another folder as --state.")
        if version > len(MIGRATIONS):
            raise StateError(
                f"{path} was written by a newer jaxft (schema {version}, this one knows {len(MIGRATIONS)}). Install "
                "that release again, or give another folder as --state."
            )
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            self._connection.execute(f"PRAGMA {pragma}")
        for number in range(version, len(MIGRATIONS)):
            script = f"BEGIN IMMEDIATE; {MIGRATIONS[number]} PRAGMA user_version={number + 1}; "
            self._connection.executescript(f"{script} PRAGMA application_id={APPLICATION}; COMMIT;")

    def _pragma(self, name: str) -> Any:
        return self._connection.execute(f"PRAGMA {name}").fetchone()[0]

    @contextlib.contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of the block is written, or, if it raises, nothing. Within another one it is part of it.

        Raises sqlite3.OperationalError if the disk is full.
        """
        with self._lock:
            if self._connection.in_transaction:
                yield self._connection
                return
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # SQLite has rolled back by itself when the disk is full
                    self._connection.execute("ROLLBACK")
                raise
            self.changes += 1

    def all(self, sql: str, values: Sequence[Any] = ()) -> list[Row]:
        """The rows of a query."""
        with self._lock:
            return self._connection.execute(sql, values).fetchall()

    def one(self, sql: str, values: Sequence[Any] = ()) -> Row | None:
        """The first row of a query; None if it has none."""
        rows = self.all(sql, values)
        return rows[0] if rows else None

    def close(self) -> None:
        """Ends the connection; harmless when called again."""
        with self._lock:
            self._connection.close()
