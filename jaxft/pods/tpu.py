"""Slices of the Cloud TPU API: nodes, each a whole slice, alone or through a queued resource."""

import math
from dataclasses import dataclass
from typing import Any

from jaxft.errors import PodError
from jaxft.hardware.topology import cubic_shape
from jaxft.pods.gcloud import error_of
from jaxft.pods.hosts import GoogleSlices
from jaxft.pods.machines import accelerator_type, machine_of
from jaxft.pods.request import LABEL
from jaxft.pods.slices import Phase, State, Worker
from jaxft.pods.states import maintenance_of, whole
from jaxft.pods.things import Thing

NODE_PHASES = {
    "CREATING": Phase.CREATING, "STARTING": Phase.CREATING, "READY": Phase.READY, "RESTARTING": Phase.LOST,
    "REIMAGING": Phase.LOST, "REPAIRING": Phase.LOST, "STOPPING": Phase.LOST, "STOPPED": Phase.LOST,
    "PREEMPTED": Phase.LOST, "TERMINATED": Phase.LOST, "HIDDEN": Phase.LOST, "DELETING": Phase.DELETING,
    "HIDING": Phase.LOST, "UNHIDING": Phase.LOST,
}  # fmt: skip
QUEUE_PHASES = {
    "CREATING": Phase.WAITING, "ACCEPTED": Phase.WAITING, "WAITING_FOR_RESOURCES": Phase.WAITING,
    "PROVISIONING": Phase.CREATING, "ACTIVE": Phase.READY, "FAILED": Phase.REFUSED, "SUSPENDING": Phase.LOST,
    "SUSPENDED": Phase.LOST, "DELETING": Phase.DELETING,
}  # fmt: skip
# TIMEOUT and UNHEALTHY_TENSORFLOW tell of a server that a node with TensorFlow would run, and jaxft does not.
LOST_HEALTH = "UNHEALTHY_MAINTENANCE"
QUEUE_HOURS = 24.0  # of a request that needs the queue, where the user names no limit


@dataclass(frozen=True)
class TpuSlices(GoogleSlices):
    """Nodes, of which `node` names the queued resource too. hours: a limit for flex-start."""

    def create(self) -> None:
        """See Slices."""
        if self.request.queued:
            if not self.gcloud.created([*self._track, *self._queue.create], self._queue_flags()):
                self._queue.check(self.request.name)
            return
        (thing,) = self._nodes
        runtime = f"--version={machine_of(self.request.shape).runtime}"
        spot = ["--spot"] if self.request.spot else []
        if not self.gcloud.created([*self._track, *thing.create], [*self._node_flags(), runtime, *spot]):
            thing.check(self.request.name)

    def state(self) -> State:
        """See Slices. Raises PodError for a word of the API that is not known here."""
        if self.request.queued:
            state = self._queue_state()
            if state.phase != Phase.READY:
                return state
        states = [self._node_state(thing.description()) for thing in self._nodes]
        all_gone = all(state.phase == Phase.ABSENT for state in states)
        if self.request.queued and all_gone:
            return State(Phase.LOST, "absent", "the queued resource is active and its nodes are gone")
        return whole(states)

    def workers(self) -> tuple[Worker, ...]:
        """See Slices."""
        out: list[Worker] = []
        for number, thing in enumerate(self._nodes):
            endpoints = (thing.description() or {}).get("networkEndpoints", [])
            if len(endpoints) != self.request.hosts:
                raise PodError(
                    f"{self.gcloud.pool}: node {thing.name} has {len(endpoints)} of {self.request.hosts} hosts. If it "
                    "stays so, delete the run and create it again: jaxft pod delete, jaxft pod run"
                )
            for host, endpoint in enumerate(endpoints):
                out.append(Worker(len(out), number, host, thing.name, endpoint["ipAddress"]))
        return tuple(out)

    def guard_flags(self, of_slice: int) -> tuple[str, ...]:
        """See Slices. Several slices always have a queued resource, which is deleted with all of them."""
        queued = [f"--queued={self.node}"] if self.request.queued else []
        return ("--api=tpu", f"--node={self.names[of_slice]}", *queued, *self.reach.where)

    def delete(self) -> None:
        """See Slices. Raises PodError if something of these names is not this run's, and leaves it."""
        # A queued resource that stays keeps its name and its quota, whatever becomes of its nodes.
        for thing in [*([self._queue] if self.request.queued else []), *self._nodes]:
            thing.delete(self.request.name, self.sleep)

    @property
    def _track(self) -> list[str]:
        """Flex-start, reservations by name and most shapes by name are options of the alpha commands alone."""
        by_shape = not self._has_usual_shape and self.request.shape.chip.name != "v4"
        return ["alpha"] if self.request.flex_start or self.request.reservation or by_shape else []

    @property
    def _has_usual_shape(self) -> bool:
        """Whether the torus is the one that an accelerator type means, of all with its number of chips."""
        shape = self.request.shape
        return shape.chip.dimensions == 2 or shape.shape == cubic_shape(shape.chip, math.prod(shape.shape))

    @property
    def _queue(self) -> Thing:
        words, where = ("compute", "tpus", "queued-resources"), (f"--zone={self.zone}",)
        return Thing(self.gcloud, words, self.node, where, delete_flags=("--force", "--async"))

    @property
    def _nodes(self) -> list[Thing]:
        words, where = ("compute", "tpus", "tpu-vm"), (f"--zone={self.zone}",)
        return [Thing(self.gcloud, words, name, where, delete_flags=("--async",)) for name in self.names]

    def _node_flags(self) -> list[str]:
        request = self.request
        flags = [
            f"--zone={self.zone}", *self._size_flags(), "--scopes=https://www.googleapis.com/auth/cloud-platform",
            f"--labels={LABEL}={request.name}",
        ]  # fmt: skip
        flags += [f"--network={request.network}"] if request.network else []
        flags += [f"--subnetwork={request.subnetwork}"] if request.subnetwork else []
        flags += [f"--service-account={request.service_account}"] if request.service_account else []
        return flags + (["--internal-ips"] if request.internal_ip or request.iap else [])

    def _size_flags(self) -> list[str]:
        shape = self.request.shape
        if self._has_usual_shape:
            return [f"--accelerator-type={accelerator_type(shape)}"]
        torus = "x".join(map(str, shape.shape))
        return [f"--type={machine_of(shape).accelerator}", f"--topology={torus}"]

    def _queue_flags(self) -> list[str]:
        request = self.request
        count = [f"--node-id={self.node}"]
        if request.slices > 1:
            count = [f"--node-count={request.slices}", f"--node-prefix={self.node}"]
        wait = QUEUE_HOURS if request.queue_hours is None else request.queue_hours
        flags = [
            *self._node_flags(), f"--runtime-version={machine_of(request.shape).runtime}", *count,
            f"--valid-until-duration={max(1, int(wait * 3600))}s", "--async",
        ]  # fmt: skip
        flags += ["--spot"] if request.spot else []
        if request.flex_start:
            flags += ["--provisioning-model=flex-start", f"--max-run-duration={max(600, int(self.hours * 3600))}s"]
        return flags + (["--reserved", f"--reservation={request.reservation}"] if request.reservation else [])

    def _queue_state(self) -> State:
        described = self._queue.description()
        if described is None:
            return State(Phase.ABSENT, "absent")
        answer = described.get("state", {})
        word = str(answer.get("state"))
        if word not in QUEUE_PHASES:
            raise PodError(
                f"{self.gcloud.pool}: the queued resource {self.node} is {word}, which this jaxft does not know. Look "
                f"at it: gcloud compute tpus queued-resources describe {self.node} --zone={self.zone}"
            )
        message = _message(answer)
        if word == "FAILED":
            message = str(error_of(message or "the queued resource failed and gives no reason", self.gcloud.pool))
        return State(QUEUE_PHASES[word], word, message)

    def _node_state(self, described: dict[str, Any] | None) -> State:
        if described is None:
            return State(Phase.ABSENT, "absent")
        word, health = str(described.get("state")), str(described.get("health", ""))
        if word not in NODE_PHASES:
            raise PodError(
                f"{self.gcloud.pool}: node {described.get('name')} is {word}, which this jaxft does not know. Look at "
                f"it: gcloud compute tpus tpu-vm list --zone={self.zone}"
            )
        maintenance = maintenance_of(described.get("upcomingMaintenance"))
        message = str(described.get("healthDescription", ""))
        if word == "READY" and health == LOST_HEALTH:
            return State(Phase.LOST, health, message, maintenance)
        return State(NODE_PHASES[word], word, message, maintenance)


def _message(answer: dict[str, Any]) -> str:
    """What the data of a state say of an error, such as `failedData.error.message`, with its code."""
    for data in answer.values():
        error = data.get("error") if isinstance(data, dict) else None
        if isinstance(error, dict):
            code = f"code {error['code']}: " if "code" in error else ""
            return f"{code}{error.get('message', '')}"
    return ""
