"""The start of jax.distributed, once in each process even if there is only one, and its check for preemption. Without
it a SIGTERM kills the process, and `reached_preemption` is always False. With it JAX handles SIGTERM: the process
continues until the training loop sees `reached_preemption` and stops. A phase that never checks, such as an export,
ends only by SIGKILL. `jaxft.sharding.stopping` has what phases call that are not training.
"""

import itertools
import logging
import os
import socket

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point

from jaxft.errors import ConfigError

HEARTBEAT_SECONDS = 100  # JAX's own default

_check_numbers = itertools.count(1)
_reached = False


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
) -> bool:
    """Initializes jax.distributed; returns False if it is initialized already.

    coordinator: `host:port` of process 0. Give it with num_processes and process_id, or give none of the three: then
    JAX detects them on a TPU pod, SLURM, Open MPI or Kubernetes, and anywhere else the run is a single process on a
    free local port.
    heartbeat_seconds: after this long without a heartbeat a process counts as dead and the others abort
    (`jaxft.sharding.ending` explains such an end).
    Call it before anything uses a device. Raises ConfigError if that is too late, if only some of the three are given,
    or for heartbeat_seconds below 1.
    """
    if jax.distributed.is_initialized():
        return False
    given = (coordinator, num_processes, process_id)
    if any(x is None for x in given) and any(x is not None for x in given):
        raise ConfigError(
            f"give all of coordinator={coordinator!r}, num_processes={num_processes}, process_id={process_id}, "
            "or none of them"
        )
    if heartbeat_seconds < 1:
        raise ConfigError(f"heartbeat_seconds={heartbeat_seconds}: give a whole number of seconds, such as 100")
    logging.getLogger("jax._src.distributed").setLevel(logging.ERROR)  # it warns of every proxy variable
    try:
        if coordinator is not None:
            _bypass_proxies(coordinator.rpartition(":")[0])
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                cluster_detection_method="deactivate",
                heartbeat_timeout_seconds=heartbeat_seconds,
            )
        else:
            _detect_or_single(heartbeat_seconds)
    except RuntimeError as error:
        if "must be called before" not in str(error):
            raise
        raise ConfigError(
            "jax.distributed must start before JAX touches a device, and something has used one already "
            "(jax.devices(), an array, a random key). Call jaxft.sharding.distributed.start() first; in a notebook, "
            "restart the kernel. Without it SIGTERM cannot be answered with a checkpoint."
        ) from error
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


def _detect_or_single(heartbeat_seconds: int) -> None:
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_seconds)
    except ValueError as error:
        if "should be defined" not in str(error):
            raise
        _bypass_proxies("127.0.0.1")
        address = f"127.0.0.1:{_free_port()}"
        jax.distributed.initialize(
            address,
            1,
            0,
            cluster_detection_method="deactivate",
            coordinator_bind_address=address,  # the default listens on every network interface
            heartbeat_timeout_seconds=heartbeat_seconds,
        )


def _bypass_proxies(host: str) -> None:
    # gRPC sends even loopback connections through http_proxy, and would wait for minutes.
    exempt = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy") or ""
    os.environ["no_grpc_proxy"] = ",".join(filter(None, [exempt, host]))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
