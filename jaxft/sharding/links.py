"""Connections between process 0 and each other process of a run, by which all learn at once that one has ended.

The system closes the connections of a process that dies, however it dies; a process that stops on purpose says why.
So a process that meets an error of a library below can ask whether another process is the cause.
"""

import contextlib
import json
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

LONGEST = 2**16  # bytes of a message
POLL_SECONDS = 0.5
SEND_SECONDS = 5.0  # for a message that the other side does not take
REASON = 2000  # characters of a reason that are told


class Endpoint(Protocol):
    """What the system can wait for."""

    def fileno(self) -> int:
        """Its number in the system."""


E = TypeVar("E", bound=Endpoint)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A process that has ended before the run. reason: completes "process N". reported: whether it said so itself."""

    process: int
    reason: str
    reported: bool


class Connection:
    """A socket that carries messages, each a line of JSON."""

    def __init__(self, endpoint: socket.socket) -> None:
        self._socket, self._received, self._lock = endpoint, b"", threading.Lock()
        self.heard = time.monotonic()  # when the last message came
        endpoint.settimeout(SEND_SECONDS)

    def fileno(self) -> int:
        """For select."""
        return self._socket.fileno()

    @property
    def host(self) -> str:
        """The address of the other side."""
        with contextlib.suppress(OSError):
            return str(self._socket.getpeername()[0])
        return "an unknown address"

    def watch_host(self, seconds: int) -> None:
        """Has the system notice within `seconds` that the machine of the other side cannot be reached any more."""
        options = {"TCP_KEEPIDLE": seconds // 3, "TCP_KEEPINTVL": seconds // 6, "TCP_KEEPCNT": 4}
        if self._socket.family not in (socket.AF_INET, socket.AF_INET6):
            return
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in options.items():
            if hasattr(socket, name):  # not on every system
                self._socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), min(max(1, value), 32767))

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends a message; nothing happens if the other side is gone."""
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come, once the socket is readable; None if the other side has closed it.

        Raises ValueError for what is no message.
        """
        try:
            block = self._socket.recv(LONGEST)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not block:
            return None
        self.heard = time.monotonic()
        *lines, self._received = (self._received + block).split(b"\n")
        messages = [json.loads(line) for line in lines]
        if len(self._received) > LONGEST or not all(isinstance(message, dict) for message in messages):
            raise ValueError("no message of a run")
        return messages

    def close(self) -> None:
        """Ends the connection; what was sent arrives."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        self._socket.close()


def readable(endpoints: Iterable[E], seconds: float) -> list[E]:
    """Those from which something can be read, as soon as there is one; none after `seconds`."""
    poller, by_number = select.poll(), {endpoint.fileno(): endpoint for endpoint in endpoints}
    for number in by_number:
        poller.register(number, select.POLLIN)
    return [by_number[number] for number, _ in poller.poll(1000 * seconds)]


class Links:
    """The connections of this process: of process 0 to all others, of another process to process 0.

    peers: the connections by the process at the other side. hosts: the names of the machines by process. on_loss: is
    called once, in a thread of its own, when a process has ended before the run.
    """

    def __init__(
        self,
        me: int,
        peers: Mapping[int, Connection],
        hosts: Mapping[int, str],
        heartbeat_seconds: int,
        on_loss: Callable[[Loss], None],
    ) -> None:
        self.me, self.count = me, len(hosts)
        self._peers, self._hosts, self._on_loss = dict(peers), dict(hosts), on_loss
        self._heartbeat_seconds = heartbeat_seconds
        self._done: set[int] = set()
        self._loss: Loss | None = None
        self._known, self._lock = threading.Event(), threading.Lock()
        for connection in self._peers.values():
            connection.watch_host(heartbeat_seconds)
        threading.Thread(target=self._watch, name="links", daemon=True).start()

    def wait(self, seconds: float) -> Loss | None:
        """The process that has ended before the run, as soon as one is known; None if none is after `seconds`."""
        self._known.wait(seconds)
        return self._loss

    def finish(self) -> None:
        """Tells the others that this process has done its part. They are watched as long as it lives."""
        self._tell({"done": self.me})

    def fail(self, reason: str, seconds: float) -> None:
        """Tells the others that this process ends, and why. Process 0 waits until they have ended, or for `seconds`."""
        self.report(Loss(process=self.me, reason=reason[:REASON], reported=True))
        until = time.monotonic() + seconds
        while self.me == 0 and self._peers and time.monotonic() < until:
            time.sleep(POLL_SECONDS / 5)

    def report(self, loss: Loss) -> None:
        """Tells the others of a process that has ended."""
        self._tell({"loss": asdict(loss)})

    def silent(self) -> Loss | None:
        """The process that has sent nothing for the longest time, if that is more than half of the heartbeat."""
        ages = {number: time.monotonic() - connection.heard for number, connection in dict(self._peers).items()}
        number = max(ages, key=ages.__getitem__, default=None)
        if number is None or ages[number] < self._heartbeat_seconds / 2:
            return None
        where = self._hosts.get(number, "an unknown machine")
        reason = (
            f"(on {where}) gave no sign of life for {ages[number]:.0f} s: it is stopped, or its machine is too busy"
        )
        return Loss(process=number, reason=reason, reported=False)

    def _tell(self, message: Mapping[str, Any]) -> None:
        for connection in list(self._peers.values()):
            connection.send(message)

    def _watch(self) -> None:
        pinged = time.monotonic()
        while self._peers:
            ready = readable(self._peers.values(), POLL_SECONDS)
            for number, connection in list(self._peers.items()):
                if connection in ready:
                    self._read(number, connection)
            if time.monotonic() - pinged > self._heartbeat_seconds / 8:
                pinged = time.monotonic()
                self._tell({})

    def _read(self, number: int, connection: Connection) -> None:
        try:
            messages = connection.receive()
        except ValueError:
            messages = None
        for message in messages or ():
            if "done" in message:
                self._done.add(number)
            if "loss" in message:
                self._take(Loss(**message["loss"]))
        if messages is None:
            self._peers.pop(number).close()
            if number not in self._done and not sys.is_finalizing():
                where = self._hosts.get(number, "an unknown machine")
                reason = f"(on {where}) is gone: it was killed, perhaps for want of memory, or its machine was lost"
                self._take(Loss(process=number, reason=reason, reported=False))

    def _take(self, loss: Loss) -> None:
        with self._lock:
            if self._loss is not None or loss.process == self.me:
                return
            self._loss = loss
        if self.me == 0:  # each other process has a connection to process 0 alone
            self.report(loss)
        self._known.set()
        threading.Thread(target=self._on_loss, args=(loss,), name="loss", daemon=True).start()


_current: list[Links] = []


def current() -> Links | None:
    """The links of this process; None if it is the only one of its run."""
    return _current[-1] if _current else None


def set_current(links: Links) -> None:
    """Makes these the links of this process."""
    _current[:] = [links]
