"""The start of jax.distributed, once in each process even if there is only one, and its check for preemption. Without
it a SIGTERM kills the process, and `reached_preemption` is always False. With it JAX handles SIGTERM: the process
continues until the training loop sees `reached_preemption` and stops. A phase that never checks, such as an export,
ends only by SIGKILL. `jaxft.sharding.stopping` has what phases call that are not training.
"""

import ipaddress
import itertools
import logging
import os
import socket
import time
from collections.abc import Sequence

import jax
from jax._src import cloud_tpu_init, xla_bridge
from jax._src.clusters import ClusterEnv  # what jax.distributed detects has no public name
from jax.experimental.multihost_utils import reached_preemption_sync_point

from jaxft.errors import ConfigError, PeerLostError
from jaxft.sharding import ending
from jaxft.sharding.expectations import Expected, check_platform, check_processes, is_only_host, refuse_lonely_worker
from jaxft.sharding.links import Links, set_current
from jaxft.sharding.meeting import BIND_VARIABLE, EVERY, Group, joined, meet, parse_address

HEARTBEAT_SECONDS = 100  # JAX's own default
START_SECONDS = 300
DETECT_SECONDS = 2.0  # between two questions to a server that does not answer
ANY = Expected()
PORT_VARIABLE = "JAX_COORDINATOR_PORT"  # JAX's own
TPU_PORT = "8476"  # users reported that firewall rules of TPU slices do not open 8482, JAX's default since 0.8.1
# Nobody watches a process that is alone. JAX would take a machine that slept, or a clock that was set, for its death.
ALONE_SECONDS = 10**7

_check_numbers = itertools.count(1)
_reached = False


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
    start_seconds: int = START_SECONDS,
    expected: Expected = ANY,
) -> bool:
    """Initializes jax.distributed once all processes have met; returns False if it is initialized already.

    coordinator: `host:port` of process 0, which listens on that interface alone. Give it with num_processes and
    process_id, or give none of the three: then JAX detects them on a TPU pod, SLURM, Open MPI or Kubernetes, and
    anywhere else the run is a single process. heartbeat_seconds: after this long without a sign of life a process
    counts as dead. start_seconds: how long process 0 waits for the others, and they for it. From then on
    `jaxft.sharding.ending` ends this process if another one dies. expected: what the run must find. On a TPU slice
    process 0 listens at JAX_COORDINATOR_PORT, by default 8476.

    Call it before anything uses a device. Raises ConfigError if that is too late, for an address or a number that
    cannot be right, if only some of the three are given, and if something else is found than was expected;
    PeerLostError if a process did not come.
    """
    if jax.distributed.is_initialized():
        return False
    for name, seconds in (("heartbeat_seconds", heartbeat_seconds), ("start_seconds", start_seconds)):
        if seconds < 1:
            raise ConfigError(f"{name}={seconds}: give a whole number of seconds, such as 100")
    logging.getLogger("jax._src.distributed").setLevel(logging.ERROR)  # it warns of every proxy variable
    if cloud_tpu_init.running_in_cloud_tpu_vm:
        os.environ.setdefault(PORT_VARIABLE, TPU_PORT)
    group, devices = _group(coordinator, num_processes, process_id, start_seconds)
    check_processes(expected, 1 if group is None else group.count)
    _refuse_late_start()
    if group is None:
        refuse_lonely_worker()
        address = joined("127.0.0.1", _free_port())
        _bypass_proxies("127.0.0.1")
        _initialize(address, 1, 0, address, devices, ALONE_SECONDS)
        check_platform(expected, 0, 1)
        return True
    peers, hosts, bound = meet(group, start_seconds, ending.say)
    _bypass_proxies(group.host)
    if group.count > 1:
        set_current(Links(group.me, peers, hosts, heartbeat_seconds, ending.end_with))
        ending.watch_aborts()
    else:
        heartbeat_seconds = ALONE_SECONDS
    _initialize(group.address, group.count, group.me, bound, devices, heartbeat_seconds)
    check_platform(expected, group.me, group.count)
    return True


def reached_preemption() -> bool:
    """Whether all processes have agreed to save now and stop, because one of them received SIGTERM. Every process must
    call it after every step. Always False unless `start` was called; once True, it stays so.
    """
    global _reached
    # JAX has the processes agree on the highest number that any of them has passed, plus one. Before the first call
    # this number is one. A resumed run that passed the numbers of its steps would never reach it, and a SIGTERM during
    # restoring or compilation would be lost. So the calls are numbered, not the steps.
    _reached = reached_preemption_sync_point(next(_check_numbers)) or _reached
    return _reached


def _group(
    coordinator: str | None, num_processes: int | None, process_id: int | None, start_seconds: int
) -> tuple[Group | None, Sequence[int] | None]:
    """(the processes of this run, None if this one is alone; the devices that a cluster gives to it)."""
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    if all(value is not None for value in given.values()):
        return _checked(str(coordinator), num_processes, process_id, "--coordinator"), None
    if any(value is not None for value in given.values()):
        told = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ConfigError(f"give all of {told}, or none of them")
    if cloud_tpu_init.running_in_cloud_tpu_vm and is_only_host():
        return None, None
    try:
        address, count, me, devices = _detected(start_seconds)
    except RuntimeError as error:  # a coordinator whose name stays unknown
        raise PeerLostError(f"process 0 of the cluster could not be reached: {error}") from error
    except OSError as error:
        raise PeerLostError(
            f"the server that tells the processes of this cluster about each other does not answer: {error}. Start "
            "again, or give --coordinator, --num_processes and --process_id."
        ) from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(
            f"the environment looks like that of a cluster, and its processes cannot be read from it ({error}). Give "
            "--coordinator, --num_processes and --process_id, or unset its variables, such as SLURM_*, OMPI_* or TPU_*."
        ) from error
    if count is None or count == 1:
        return None, devices
    return _checked(str(address), count, me, "the coordinator of the cluster"), devices


def _detected(seconds: int) -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
    """(coordinator, number of processes, this one's number, its devices) as JAX detects them, None if there are none.

    On a TPU slice it reads them from a server of Google Cloud that has moments without an answer, and gives up at the
    first of them; here it is tried for so many seconds.
    """
    until, told = time.monotonic() + seconds, False
    while True:
        try:
            return ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, seconds)
        except OSError as error:
            if time.monotonic() > until:
                raise
            if not told:
                told = True
                ending.say(
                    f"the server that knows this cluster does not answer ({error}); asking for up to {seconds} s"
                )
            time.sleep(DETECT_SECONDS)


def _checked(address: str, count: int | None, me: int | None, option: str) -> Group:
    """The group of these numbers. Raises ConfigError if they cannot be right."""
    host, port = parse_address(address, option)
    if not isinstance(count, int) or count < 1:
        raise ConfigError(f"num_processes={count!r}: give the number of processes of the run, one or more")
    if not isinstance(me, int) or not 0 <= me < count:
        raise ConfigError(
            f"process_id={me!r} with num_processes={count}: processes are counted from 0 to {count - 1}, and each has "
            "a number of its own"
        )
    if own := os.environ.get(BIND_VARIABLE):
        return Group(host=host, port=port, bind=parse_address(own, BIND_VARIABLE), count=count, me=me)
    bind = host if option.startswith("--") else _interface(host)
    return Group(host=host, port=port, bind=(bind, port), count=count, me=me)


def _interface(host: str) -> str:
    """The address of this machine that has the name by which a cluster calls process 0; EVERY if that is not clear.

    Many systems give a machine's own name an address of its loopback interface, which others cannot reach.
    """
    try:
        for *_, own in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
            address = ipaddress.ip_address(str(own[0]).partition("%")[0])
            if not address.is_loopback or host == str(address):
                with socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET) as probe:
                    probe.bind((str(own[0]), 0))
                return str(own[0])
    except (OSError, ValueError):
        return EVERY
    return EVERY


def _initialize(
    address: str, count: int, me: int, bound: str, devices: Sequence[int] | None, heartbeat_seconds: int
) -> None:
    jax.distributed.initialize(
        address,
        count,
        me,
        local_device_ids=devices,
        cluster_detection_method="deactivate",
        coordinator_bind_address=bound,  # the default listens on every network interface
        heartbeat_timeout_seconds=heartbeat_seconds,
    )


def _refuse_late_start() -> None:
    if xla_bridge.backends_are_initialized():
        raise ConfigError(
            "jax.distributed must start before JAX touches a device, and something has used one already "
            "(jax.devices(), an array, a random key). Call jaxft.sharding.distributed.start() first; in a notebook, "
            "restart the kernel. Without it SIGTERM cannot be answered with a checkpoint."
        )


def _bypass_proxies(host: str) -> None:
    # gRPC sends even loopback connections through http_proxy, and would wait for minutes.
    exempt = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy") or ""
    os.environ["no_grpc_proxy"] = ",".join(filter(None, [exempt, host]))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
