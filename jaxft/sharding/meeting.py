"""How the processes of a run meet: each calls process 0, which waits for all of them, before jax.distributed starts.

jax.distributed itself would wait in silence, and abort. Here a process that does not come is named, and so is a wrong
number or address.
"""

import contextlib
import errno
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ConfigError, PeerLostError, listed
from jaxft.sharding.links import Connection, Endpoint, readable

PROTOCOL = 1
EVERY = "::"
BIND_VARIABLE = "JAX_COORDINATOR_BIND_ADDRESS"  # JAX's own
WORD_SECONDS = 10.0  # after which a process says what it waits for
RETRY_SECONDS = 0.5
# For the run before on the same port, which may be about to end.
PORT_SECONDS = 15.0
MARGIN_SECONDS = 30.0  # that the others wait longer than process 0, which then says who is missing

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Group:
    """The processes of a run as this one was told of them.

    host, port: of process 0. bind: where process 0 listens; the host EVERY stands for all interfaces. count: of
    processes. me: which one this is.
    """

    host: str
    port: int
    bind: tuple[str, int]
    count: int
    me: int

    @property
    def address(self) -> str:
        """`host:port` of process 0, as it was given."""
        return joined(self.host, self.port)


def joined(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_address(text: str, option: str = "--coordinator") -> tuple[str, int]:
    """(host, port) of `HOST:PORT`. Raises ConfigError for another form."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
    right = port.isascii() and port.isdecimal() and 0 < int(port) < 2**16
    if not colon or not host or not right or any(character.isspace() or character == "/" for character in host):
        raise ConfigError(
            f"{option}={text!r} is not HOST:PORT, such as 10.0.0.1:9911 or worker-0:9911: give the machine of process "
            "0 and a free port of it from 1 to 65535"
        )
    return host, int(port)


def meet(group: Group, seconds: float, say: Say) -> tuple[dict[int, Connection], dict[int, str], str]:
    """(connections by process, names of the machines by process, the address on which process 0 listens).

    Process 0 gets a connection to each other process, and each of those one to process 0. The port is free again when
    this returns. seconds: how long process 0 waits for the others.

    Raises ConfigError for a number or an address that cannot be right, and PeerLostError, which names what is missing,
    if a process did not come in time or ended while it waited.
    """
    until = time.monotonic() + seconds
    return _gather(group, until, seconds, say) if group.me == 0 else _join(group, until, seconds, say)


def _gather(group: Group, until: float, seconds: float, say: Say) -> tuple[dict[int, Connection], dict[int, str], str]:
    """`meet` in process 0."""
    listener, address = _listen(group, until)
    hosts = {0: socket.gethostname()}
    waiting: list[Connection] = []
    came: dict[int, Connection] = {}
    begun, told = time.monotonic(), False
    with listener:
        try:
            while len(came) < group.count - 1:
                missing = [number for number in range(1, group.count) if number not in came]
                if time.monotonic() > until:
                    raise PeerLostError(_missing(missing, group, address, seconds))
                if not told and time.monotonic() > begun + WORD_SECONDS:
                    told = True
                    say(f"process 0 waits at {address} for {_processes(missing)} of {group.count}, up to {seconds:g} s")
                endpoints: list[Endpoint] = [listener, *waiting, *came.values()]
                ready = readable(endpoints, RETRY_SECONDS)
                for number, connection in came.items():
                    if connection in ready and not connection.receive():
                        raise PeerLostError(f"process {number} of {group.count} ended while it waited for the others")
                if listener in ready:
                    with contextlib.suppress(OSError):
                        waiting.append(Connection(listener.accept()[0]))
                for connection in [one for one in waiting if one in ready]:
                    if _admit(connection, group, came, hosts, say):
                        waiting.remove(connection)
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            text = "process 0 was interrupted while it waited for the others" if interrupted else str(error)
            for connection in came.values():
                connection.send({"refused" if isinstance(error, ConfigError) else "stopped": text})
                connection.close()
            raise
    for connection in came.values():
        connection.send({"go": {str(number): name for number, name in hosts.items()}})
    return came, hosts, address


def _admit(connection: Connection, group: Group, came: dict[int, Connection], hosts: dict[int, str], say: Say) -> bool:
    """Takes a process in, or sends it away; False if it has not said yet who it is.

    Raises ConfigError if its numbers do not fit to those of process 0.
    """
    try:
        messages = connection.receive()
    except ValueError:
        messages = None
    if messages is None:  # a scanner of ports, or another stranger
        connection.close()
        return True
    if not messages:
        return False
    number, count = messages[0].get("process"), messages[0].get("processes")
    where = "".join(letter for letter in str(messages[0].get("host"))[:100] if letter.isprintable())
    wrong = None
    if messages[0].get("jaxft") != PROTOCOL:
        wrong = f"a process on {where} has another version of jaxft than process 0: install the same everywhere"
    elif count != group.count:
        wrong = (
            f"process {number} (on {where}) was started with num_processes={count}, and process 0 with {group.count}: "
            "give all the same number"
        )
    elif not isinstance(number, int) or not 0 < number < group.count:
        wrong = f"process_id={number} was given to a process on {where}, and another process is number 0: count them up"
    if wrong is not None or not isinstance(number, int):
        connection.send({"refused": wrong})
        connection.close()
        raise ConfigError(wrong)
    if number in came:
        twice = (
            f"process_id={number} was given to two processes, on {hosts[number]} and on {where}: each needs its own, "
            f"from 0 to {group.count - 1}"
        )
        say(f"process 0 sent a process away: {twice}")
        connection.send({"refused": twice})
        connection.close()
        return True
    came[number], hosts[number] = connection, where
    return True


def _join(group: Group, until: float, seconds: float, say: Say) -> tuple[dict[int, Connection], dict[int, str], str]:
    """`meet` in a process that is not process 0."""
    connection = _connect(group, until, seconds, say)
    hello = {"jaxft": PROTOCOL, "process": group.me, "processes": group.count, "host": socket.gethostname()}
    connection.send(hello)
    answer = _answer(connection, group, time.monotonic() + seconds + MARGIN_SECONDS, say)
    if "refused" in answer:
        raise ConfigError(str(answer["refused"]))
    if "go" not in answer:
        raise PeerLostError(str(answer.get("stopped")))
    return {0: connection}, {int(number): name for number, name in answer["go"].items()}, group.address


def _answer(connection: Connection, group: Group, until: float, say: Say) -> Mapping[str, Any]:
    """What process 0 says once all have come, or one is missing."""
    begun, told = time.monotonic(), False
    messages: list[dict[str, Any]] | None = []
    while not messages:
        if time.monotonic() > until:
            raise PeerLostError(f"process 0 of {group.count} at {group.address} did not answer: it is stopped or busy")
        if not told and time.monotonic() > begun + WORD_SECONDS:
            told = True
            say(f"process {group.me} of {group.count} has reached process 0, and both wait for others")
        if not readable([connection], RETRY_SECONDS):
            continue
        try:
            messages = connection.receive()
        except ValueError:
            raise ConfigError(
                f"what answers at {group.address} is not a process 0 that waits for others: it is another program, or "
                "a run that has begun already. Give all processes the address of process 0 with a free port, and start "
                "them at the same time."
            ) from None
        if messages is None:
            raise PeerLostError(
                f"process 0 of {group.count}, at {group.address}, ended before all processes had come, or another run "
                "or program answers there. See what process 0 said, and start all of them again."
            )
    return messages[0]


def _connect(group: Group, until: float, seconds: float, say: Say) -> Connection:
    """A connection to process 0, which may start later than this one."""
    begun, told = time.monotonic(), False
    while True:
        try:
            endpoint = socket.create_connection((group.host, group.port), timeout=max(1.0, WORD_SECONDS / 2))
            return Connection(endpoint)
        except (OSError, UnicodeError) as error:
            reason = _reason(error)
        if time.monotonic() > until:
            raise PeerLostError(
                f"process {group.me} of {group.count} could not reach process 0 at {group.address} within {seconds:g} "
                f"s: {reason}. Start process 0 there, and check the address and whether a firewall is between them."
            )
        if not told and time.monotonic() > begun + WORD_SECONDS:
            told = True
            say(
                f"process {group.me} of {group.count} waits for process 0 at {group.address}, up to {seconds:g} s: "
                f"{reason}"
            )
        time.sleep(RETRY_SECONDS)


def _listen(group: Group, until: float) -> tuple[socket.socket, str]:
    """(the socket on which process 0 listens, its address)."""
    host, port = group.bind
    begun, whole = time.monotonic(), joined(host, port)
    while True:
        error: OSError | UnicodeError | None = None
        try:
            for family, _, _, _, own in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                both = host == EVERY and socket.has_dualstack_ipv6()
                try:
                    listener = socket.create_server(own[:2], family=family, backlog=128, dualstack_ipv6=both)
                    return listener, joined(str(own[0]), port)
                except OSError as problem:
                    error = problem
        except (OSError, UnicodeError) as problem:
            error = problem
        if isinstance(error, socket.gaierror | UnicodeError):
            if time.monotonic() > until:
                raise PeerLostError(
                    f"process 0 cannot find its own address {whole}: {_reason(error)}. Give --coordinator a name or an "
                    "address of this machine."
                ) from error
        elif error is not None and error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(
                f"process 0 must run at the address of the coordinator, and {whole} is none of "
                f"{socket.gethostname()}. Give --coordinator the machine of process 0, and process_id=0 to no other "
                f"process. If the address is forwarded to this machine, set {BIND_VARIABLE} to HOST:PORT of an own "
                "interface."
            ) from error
        elif error is not None and error.errno != errno.EADDRINUSE:
            raise ConfigError(f"process 0 cannot listen at {whole}: {_reason(error)}") from error
        elif time.monotonic() > begun + PORT_SECONDS:
            raise ConfigError(
                f"another program on this machine listens at {whole}, perhaps another run or a second process 0: give "
                "all processes of this run another port, or end that program"
            ) from error
        time.sleep(RETRY_SECONDS)


def _reason(error: OSError | UnicodeError) -> str:
    if isinstance(error, socket.gaierror | UnicodeError):
        return "no machine of this name is known"
    return str(error.strerror or error)


def _missing(missing: list[int], group: Group, address: str, seconds: float) -> str:
    return (
        f"{_processes(missing)} of {group.count} did not come to process 0 at {address} within {seconds:g} s. "
        f"Start {'it' if len(missing) == 1 else 'them'} with --coordinator={group.address} and "
        f"--num_processes={group.count}, see what was said there, and check that the address can be reached from "
        "there; --start_seconds waits longer."
    )


def _processes(numbers: list[int]) -> str:
    return f"process{'es' if len(numbers) > 1 else ''} {listed(numbers)}"
