"""How the processes of a run meet, and what is said if one does not come or a number is wrong."""

import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from jaxft.errors import ConfigError, PeerLostError
from jaxft.sharding import distributed, meeting
from jaxft.sharding.meeting import Group, meet, parse_address


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def group(port: int, me: int, count: int = 2, host: str = "127.0.0.1") -> Group:
    return Group(host=host, port=port, bind=(host, port), count=count, me=me)


def silent(text: str) -> None:
    """Says nothing."""


def start(pool: ThreadPoolExecutor, one: Group, seconds: float = 20) -> Future[Any]:
    return pool.submit(meet, one, seconds, silent)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as threads:
        yield threads


def test_three_processes_meet_in_any_order_and_the_port_is_free_again(pool: ThreadPoolExecutor) -> None:
    port = free_port()
    futures = [start(pool, group(port, me, 3)) for me in (2, 1, 0)]
    ends = [future.result(30) for future in futures]
    assert [sorted(peers) for peers, _, _ in ends] == [[0], [0], [1, 2]]
    assert all(sorted(hosts) == [0, 1, 2] for _, hosts, _ in ends)
    with socket.create_server(("127.0.0.1", port)):  # while the connections stay
        pass
    for peers, _, _ in ends:
        for connection in peers.values():
            connection.close()


def test_it_listens_on_the_interface_that_it_was_told(pool: ThreadPoolExecutor) -> None:
    port = free_port()
    first = start(pool, group(port, 0, host="127.0.0.2"))
    with pytest.raises(PeerLostError):  # the machine has other addresses, on which nobody answers
        meet(group(port, 1), 0.5, silent)
    second = start(pool, group(port, 1, host="127.0.0.2"))
    assert first.result(30)[2] == f"127.0.0.2:{port}"
    second.result(30)


def test_a_process_that_does_not_come_is_named(pool: ThreadPoolExecutor) -> None:
    port = free_port()
    first, second = start(pool, group(port, 0, 4), 1.5), start(pool, group(port, 2, 4), 1.5)
    with pytest.raises(PeerLostError, match=r"processes 1, 3 of 4 did not come to process 0 at 127.* within 1\.5 s"):
        first.result(30)
    with pytest.raises(PeerLostError, match=r"processes 1, 3 of 4 did not come"):
        second.result(30)


def test_a_process_0_that_does_not_come_is_named() -> None:
    port = free_port()
    with pytest.raises(PeerLostError, match=rf"could not reach process 0 at 127\.0\.0\.1:{port} within 0\.5 s: "):
        meet(group(port, 1), 0.5, silent)
    with pytest.raises(PeerLostError, match=r"no machine of this name is known\. Start process 0 there"):
        meet(group(port, 1, host="no-such-host.invalid"), 0.5, silent)
    with pytest.raises(PeerLostError, match=r"cannot find its own address no-such-host\.invalid"):
        meet(group(port, 0, host="no-such-host.invalid"), 0.5, silent)


def test_a_process_that_leaves_ends_the_waiting(pool: ThreadPoolExecutor) -> None:
    port = free_port()
    first = start(pool, group(port, 0, 4))
    connection = meeting._connect(group(port, 1, 4), 1e12, 20, silent)
    connection.send({"jaxft": meeting.PROTOCOL, "process": 1, "processes": 4, "host": "there"})
    third = start(pool, group(port, 2, 4))
    threading.Timer(1.0, connection.close).start()
    with pytest.raises(PeerLostError, match="process 1 of 4 ended while it waited for the others"):
        first.result(30)
    with pytest.raises(PeerLostError, match="process 1 of 4 ended"):
        third.result(30)


def test_other_numbers_of_processes_are_refused_by_all(pool: ThreadPoolExecutor) -> None:
    port = free_port()
    first, second = start(pool, group(port, 0, 3)), start(pool, group(port, 1, 2))
    for one in (first, second):
        with pytest.raises(ConfigError, match="started with num_processes=2, and process 0 with 3"):
            one.result(30)


def test_a_number_that_is_given_twice_is_refused_and_the_run_begins(pool: ThreadPoolExecutor) -> None:
    port = free_port()
    first = start(pool, group(port, 0, 3))
    twins = [start(pool, group(port, 1, 3)) for _ in range(2)]
    while not any(twin.done() for twin in twins):
        pass
    start(pool, group(port, 2, 3)).result(30)
    first.result(30)
    errors = [twin.exception(30) for twin in twins]
    assert [type(error) for error in errors if error is not None] == [ConfigError]
    assert "process_id=1 was given to two processes" in str(errors[0] or errors[1])


def test_strangers_on_the_port_are_sent_away(pool: ThreadPoolExecutor) -> None:
    port = free_port()
    first = start(pool, group(port, 0))
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 100_000, b"[1]\n", b""):
        stranger = meeting._connect(group(port, 1), 1e12, 20, silent)
        try:
            stranger._socket.sendall(noise)
        finally:
            stranger.close()
    start(pool, group(port, 1)).result(30)
    first.result(30)


def test_a_port_in_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "PORT_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"another program on this machine listens at 127\.0\.0\.1:{port}"):
            meet(group(port, 0), 20, silent)
    with pytest.raises(ConfigError, match=r"must run at the address of the coordinator, and 192\.0\.2\.1:\d+ is none"):
        meet(group(port, 0, host="192.0.2.1"), 20, silent)


def test_what_answers_is_another_program(pool: ThreadPoolExecutor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            endpoint, _ = other.accept()
            endpoint.sendall(b"\x00\x00\x12\x04\n")
            endpoint.recv(1000)
            endpoint.close()

        done = pool.submit(answer)
        with pytest.raises(ConfigError, match="is another program, or a run that has begun already"):
            meet(group(other.getsockname()[1], 1), 20, silent)
        done.result(30)


@pytest.mark.parametrize(
    "text", ["nonsense", ":9911", "host:", "host:0", "host:70000", "host:x", "http://a:80", "a b:1"]
)
def test_nonsense_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match="is not HOST:PORT"):
        parse_address(text)


def test_addresses() -> None:
    assert parse_address("worker-0:9911") == ("worker-0", 9911)
    assert parse_address("[::1]:9911") == ("::1", 9911) and meeting.joined("::1", 9911) == "[::1]:9911"


@pytest.mark.parametrize(("count", "me"), [(2, 5), (2, 2), (2, -1), (0, 0)])
def test_wrong_numbers_are_refused(count: int, me: int) -> None:
    with pytest.raises(ConfigError, match="num_processes="):
        distributed._checked("127.0.0.1:9911", count, me, "--coordinator")


def test_an_environment_of_a_cluster_that_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.setenv(name, "x")
    with pytest.raises(ConfigError, match="looks like that of a cluster"):
        distributed._group(None, None, None, 5)


def test_a_cluster_gives_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, Callable[[], str] | str] = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
        "SLURM_LOCALID": "1",
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    found, devices = distributed._group(None, None, None, 5)
    assert found is not None and (found.count, found.me, found.bind[0]) == (2, 1, meeting.EVERY) and devices == [1]
