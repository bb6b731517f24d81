"""Slices of Compute Engine: single instances, or managed instance groups for slices of several hosts."""

import re
from dataclasses import dataclass
from typing import Any

from jaxft.errors import PodError
from jaxft.pods.gcloud import error_of
from jaxft.pods.hosts import GoogleSlices
from jaxft.pods.machines import IMAGE_PROJECT, chips_of_host, machine_of
from jaxft.pods.request import LABEL
from jaxft.pods.slices import Phase, State, Worker
from jaxft.pods.states import maintenance_of, whole
from jaxft.pods.things import Thing

NODE_LABEL = "jaxft-node"
INSTANCE_PHASES = {
    "PENDING": Phase.WAITING, "PROVISIONING": Phase.CREATING, "STAGING": Phase.CREATING, "RUNNING": Phase.READY,
    "REPAIRING": Phase.LOST, "PENDING_STOP": Phase.LOST, "STOPPING": Phase.LOST, "STOPPED": Phase.LOST,
    "SUSPENDING": Phase.LOST, "SUSPENDED": Phase.LOST, "TERMINATED": Phase.LOST, "DEPROVISIONING": Phase.DELETING,
}  # fmt: skip
BUYING = {
    "on-demand": (), "spot": ("--provisioning-model=SPOT",),
    "flex-start": ("--provisioning-model=FLEX_START", "--reservation-affinity=none"),
}  # fmt: skip
# Metadata of an instance by which Google numbers the hosts of a slice.
HOST_NUMBERS = ("worker-id", "agent-worker-number")
LONGEST_REQUEST = 7200  # seconds, that Compute Engine keeps a flex-start request of one instance


@dataclass(frozen=True)
class ComputeSlices(GoogleSlices):
    """Instances, each a slice of one host, or groups of instances."""

    @property
    def region(self) -> str:
        """The region of the zone."""
        return self.zone.rpartition("-")[0]

    @property
    def _in_groups(self) -> bool:
        return self.request.hosts > 1

    def create(self) -> None:
        """See Slices."""
        if not self._in_groups:
            waits = ["--async"] if self.request.flex_start else []
            for instance in self._instances():
                flags = [f"--zone={self.zone}", *self._instance_flags(), *waits]
                if not self.gcloud.created(instance.create, flags):
                    instance.check(self.request.name)
            return
        template = self._template()
        if not self.gcloud.created(["compute", "instance-templates", "create", self.node], self._instance_flags()):
            template.check(self.request.name)
        for group, policy in zip(self._groups(), self._policies(), strict=True):
            if not self.gcloud.created(policy.create, self._policy_flags()):
                policy.check(self.request.name)
            if not self.gcloud.created(group.create, self._group_flags(group.name)):
                group.check(self.request.name)

    def state(self) -> State:
        """See Slices. Raises PodError for a word of the API that is not known here."""
        instances = self._listed()
        count = self.request.processes
        states = [_instance_state(one) for one in instances]
        if len(instances) < count:
            states += self._missing() if self._in_groups else self._missing_instances(len(instances))
        return whole(states)

    def workers(self) -> tuple[Worker, ...]:
        """See Slices."""
        by_slice: dict[int, list[dict[str, Any]]] = {number: [] for number in range(self.request.slices)}
        for one in self._listed():
            by_slice[self._slice_of(one["name"])].append(one)
        out: list[Worker] = []
        for number, instances in by_slice.items():
            if len(instances) != self.request.hosts:
                raise PodError(
                    f"{self.gcloud.pool}: slice {number} of {self.node} has {len(instances)} of {self.request.hosts} "
                    "hosts. If it stays so, delete the run and create it again: jaxft pod delete, jaxft pod run"
                )
            for host, one in enumerate(self._in_order(number, instances)):
                address = one["networkInterfaces"][0]["networkIP"]
                out.append(Worker(len(out), number, host, one["name"], address))
        return tuple(out)

    def guard_flags(self, of_slice: int) -> tuple[str, ...]:
        """See Slices."""
        own = self.names[of_slice]
        names = [own, *(name for name in self.names if name != own)]
        groups = [f"--group={name}" for name in names] if self._in_groups else []
        return ("--api=compute", *(f"--node={name}" for name in names), *groups, *self.reach.where)

    def delete(self) -> None:
        """See Slices. Raises PodError if something of these names is not this run's, and leaves it."""
        things = self._instances()
        if self._in_groups:
            things = [*self._groups(), self._template(), *self._policies()]
        for thing in things:
            thing.delete(self.request.name, self.sleep)

    def _instance_flags(self) -> list[str]:
        request, machine = self.request, machine_of(self.request.shape)
        flags = [
            f"--machine-type={machine.machine_types[chips_of_host(request.shape)]}",
            f"--image-family={machine.image_family}", f"--image-project={IMAGE_PROJECT}",
            "--maintenance-policy=TERMINATE", "--scopes=cloud-platform",
            f"--max-run-duration={max(60, int(self.hours * 3600))}s", "--instance-termination-action=DELETE",
            f"--boot-disk-size={request.disk_gb}GB", f"--labels={LABEL}={request.name},{NODE_LABEL}={self.node}",
        ]  # fmt: skip
        flags += [f"--boot-disk-type={machine.disk_type}"] if machine.disk_type else []
        flags += self._buying_flags()
        flags += [f"--network={request.network}"] if request.network else []
        flags += [f"--subnet={request.subnetwork}"] if request.subnetwork else []
        flags += [f"--service-account={request.service_account}"] if request.service_account else []
        flags += ["--no-address"] if request.internal_ip or request.iap else []
        return flags + ([f"--region={self.region}"] if self._in_groups and request.subnetwork else [])

    def _buying_flags(self) -> list[str]:
        request = self.request
        if request.reservation is not None:
            model = "--provisioning-model=RESERVATION_BOUND"
            return [model, "--reservation-affinity=specific", f"--reservation={request.reservation}"]
        flags = list(BUYING[request.model])
        if request.flex_start and not self._in_groups:
            wanted = LONGEST_REQUEST if request.queue_hours is None else int(request.queue_hours * 3600)
            flags.append(f"--request-valid-for-duration={min(wanted, LONGEST_REQUEST)}s")
        return flags

    def _policy_flags(self) -> list[str]:
        torus = "x".join(map(str, self.request.shape.shape))
        return [
            f"--region={self.region}", "--type=HIGH_THROUGHPUT", f"--accelerator-topology={torus}", self._description,
        ]  # fmt: skip

    def _group_flags(self, name: str) -> list[str]:
        project = [] if self.gcloud.project is None else [f"projects/{self.gcloud.project}"]
        policy = "/".join([*project, "regions", self.region, "resourcePolicies", name])
        # Without do-nothing, a group replaces a machine that Google took or deleted at its time limit.
        flags = [
            f"--zone={self.zone}", f"--size={self.request.hosts}", f"--template={self.node}",
            f"--base-instance-name={name}", f"--workload-policy={policy}", "--default-action-on-vm-failure=do-nothing",
            self._description,
        ]  # fmt: skip
        return flags + (["--target-size-policy-mode=bulk"] if self.request.flex_start else [])

    @property
    def _description(self) -> str:
        return f"--description={LABEL}={self.request.name}"

    def _instances(self) -> list[Thing]:
        where = (f"--zone={self.zone}",)
        return [Thing(self.gcloud, ("compute", "instances"), name, where) for name in self.names]

    def _groups(self) -> list[Thing]:
        words, where = ("compute", "instance-groups", "managed"), (f"--zone={self.zone}",)
        return [Thing(self.gcloud, words, name, where) for name in self.names]

    def _policies(self) -> list[Thing]:
        words, where = ("compute", "resource-policies"), (f"--region={self.region}",)
        return [Thing(self.gcloud, words, name, where, kind="workload-policy") for name in self.names]

    def _template(self) -> Thing:
        return Thing(self.gcloud, ("compute", "instance-templates"), self.node)

    def _listed(self) -> list[dict[str, Any]]:
        """The instances of this node, as the API describes them."""
        listed = self.gcloud.answer(
            ["compute", "instances", "list"],
            [
                f"--zones={self.zone}",
                f"--filter=labels.{LABEL}={self.request.name} AND labels.{NODE_LABEL}={self.node}",
            ],
        )
        return [one for one in listed or [] if one.get("labels", {}).get(NODE_LABEL) == self.node]

    def _missing_instances(self, there: int) -> list[State]:
        if there == 0:
            return [State(Phase.ABSENT, "absent")]
        return [State(Phase.LOST, "absent", f"{self.request.slices - there} of {self.request.slices} slices are gone")]

    def _missing(self) -> list[State]:
        """The state of the hosts that groups have not brought yet."""
        states = []
        for group in self._groups():
            words = [*group.words, "list-instances", group.name]
            members = self.gcloud.answer(words, [f"--zone={self.zone}"], name=group.name)
            if members is None:
                states.append(State(Phase.ABSENT, "absent"))
                continue
            states += [self._member_state(one) for one in members]
            if len(members) < self.request.hosts:
                states.append(State(Phase.CREATING, "CREATING"))
        return states

    def _member_state(self, member: dict[str, Any]) -> State:
        """The state of an instance that its group tries to bring."""
        action = str(member.get("currentAction", "NONE"))
        errors = member.get("lastAttempt", {}).get("errors", {}).get("errors", [])
        message = "; ".join(f"{one.get('code', '')}: {one.get('message', '')}" for one in errors)
        if message:
            # A group goes on to try, so that someone who waits need not ask again.
            waits = self.request.queue_hours is not None or self.request.flex_start
            return State(Phase.WAITING if waits else Phase.REFUSED, action, str(error_of(message, self.gcloud.pool)))
        if action in ("DELETING", "ABANDONING"):
            return State(Phase.DELETING, action)
        return State(Phase.CREATING, action)

    def _slice_of(self, instance: str) -> int:
        for number, name in enumerate(self.names):
            if re.fullmatch(rf"{re.escape(name)}(-[a-z0-9]{{4,}})?" if self._in_groups else re.escape(name), instance):
                return number
        raise PodError(f"instance {instance} has the labels of {self.node} and another name: jaxft did not create it")

    def _in_order(self, number: int, instances: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The instances of a slice in the order of their host numbers, which their names do not tell."""
        if len(instances) == 1:
            return instances
        numbered: dict[int, dict[str, Any]] = {}
        for one in instances:
            numbered[self._host_number(one)] = one
        if sorted(numbered) != list(range(len(instances))):
            raise PodError(
                f"{self.gcloud.pool}: the hosts of slice {number} of {self.node} are numbered {sorted(numbered)}, and "
                f"not from 0 to {len(instances) - 1}. They may still be starting: run the same command again"
            )
        return [numbered[host] for host in range(len(instances))]

    def _host_number(self, instance: dict[str, Any]) -> int:
        """The number of a host in its slice, from its metadata, which a host may know before the API shows it."""
        items = {one["key"]: one.get("value", "") for one in instance.get("metadata", {}).get("items", [])}
        for key in HOST_NUMBERS:
            if items.get(key, "").isdigit():
                return int(items[key])
        worker = Worker(0, 0, 0, instance["name"], instance["networkInterfaces"][0]["networkIP"])
        for key in HOST_NUMBERS:
            url = f"http://metadata.google.internal/computeMetadata/v1/instance/attributes/{key}"
            done = self.ssh(worker, ["curl", "--silent", "--fail", "--header", "Metadata-Flavor: Google", url])
            if done.code == 0 and done.out.strip().isdigit():
                return int(done.out)
        raise PodError(
            f"{self.gcloud.pool}: {instance['name']} does not tell which host of its slice it is (metadata "
            f"{' or '.join(HOST_NUMBERS)}). It may still be starting: run the same command again"
        )


def _instance_state(instance: dict[str, Any]) -> State:
    word = str(instance.get("status"))
    if word not in INSTANCE_PHASES:
        raise PodError(
            f"Compute Engine says that {instance.get('name')} is {word}, which this jaxft does not know. Look at it: "
            f"gcloud compute instances describe {instance.get('name')}"
        )
    maintenance = maintenance_of(instance.get("resourceStatus", {}).get("upcomingMaintenance"))
    return State(INSTANCE_PHASES[word], word, str(instance.get("statusMessage", "")), maintenance)
