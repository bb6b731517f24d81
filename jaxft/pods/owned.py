"""All that jaxft created in a project and that is still there, whatever this machine remembers of it."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.errors import PodError
from jaxft.pods.command import Run, run
from jaxft.pods.gcloud import Gcloud
from jaxft.pods.machines import MACHINES
from jaxft.pods.request import LABEL
from jaxft.pods.things import Thing, labels_of

# An API that a project never switched on has no machines there.
OFF = re.compile(r"SERVICE_DISABLED|has not been used in project|it is disabled|is not enabled", re.IGNORECASE)


@dataclass(frozen=True)
class Kind:
    """words: gcloud's words for the kind. flags: of its list. machine: whether it is a machine, which costs money.

    delete_flags: that only a deletion takes. name: of the kind, for readers.
    """

    name: str
    words: tuple[str, ...]
    flags: tuple[str, ...]
    machine: bool = False
    delete_flags: tuple[str, ...] = ()


_LABELLED, _DESCRIBED = f"--filter=labels.{LABEL}:*", f"--filter=description~^{LABEL}="
# In the order of deletion: what holds others first.
KINDS = (
    Kind(
        "queued resource", ("compute", "tpus", "queued-resources"), ("--zone=-",), delete_flags=("--force", "--async")
    ),
    Kind("node", ("compute", "tpus", "tpu-vm"), ("--zone=-", _LABELLED), True, ("--async",)),
    Kind("group", ("compute", "instance-groups", "managed"), (_DESCRIBED,)),
    Kind("instance", ("compute", "instances"), (_LABELLED,), True),
    Kind("template", ("compute", "instance-templates"), (f"--filter=properties.labels.{LABEL}:*",)),
    Kind("policy", ("compute", "resource-policies"), (_DESCRIBED,)),
)


@dataclass(frozen=True)
class Owned:
    """One thing that jaxft created. run: its run. kind: what it is. where: its zone or region, "" for neither.

    state: the API's word. since: when it was created, as the API writes it. chips: of a machine; 0 for all else.
    chip: their kind, None for what is no machine. spot: whether it is a spot machine.
    """

    run: str
    name: str
    kind: Kind
    where: str
    state: str
    since: str
    chips: int = 0
    chip: str | None = None
    spot: bool = False

    def thing(self, gcloud: Gcloud) -> Thing:
        """The same as something that can be deleted."""
        region = self.where and not re.search(r"-[a-z]$", self.where)
        where = (f"--{'region' if region else 'zone'}={self.where}",) if self.where else ()
        return Thing(gcloud, self.kind.words, self.name, where, delete_flags=self.kind.delete_flags)


def owned(project: str | None, run: Run = run, *, name: str | None = None) -> list[Owned]:
    """Everything with jaxft's label in a project, or what is of the run `name`. Raises PodError if an API refuses."""
    gcloud = Gcloud(run, project, "Google Cloud" if project is None else f"project {project}")
    out = []
    for kind in KINDS:
        for one in _listed(gcloud, kind):
            run_name = labels_of(one).get(LABEL)
            if run_name is not None and name in (None, run_name):
                out.append(_owned(kind, run_name, one))
    return out


def delete_owned(things: Sequence[Owned], project: str | None, sleep: Callable[[float], None], run: Run = run) -> None:
    """Deletes the things, what holds others first, and returns once the API no longer knows of any."""
    gcloud = Gcloud(run, project, "Google Cloud" if project is None else f"project {project}")
    for one in sorted(things, key=lambda one: KINDS.index(one.kind)):
        one.thing(gcloud).delete(one.run, sleep)


def _listed(gcloud: Gcloud, kind: Kind) -> list[dict[str, Any]]:
    try:
        answer = gcloud.answer([*kind.words, "list"], kind.flags)
    except PodError as error:
        if OFF.search(str(error)):
            return []
        raise
    return answer or []


def _owned(kind: Kind, run: str, one: Mapping[str, Any]) -> Owned:
    name = str(one["name"])
    zone = one.get("zone") or one.get("region") or _part(name, "locations")
    state = one.get("state", one.get("status", ""))
    chip, chips = _chips(one) if kind.machine else (None, 0)
    scheduling = one.get("schedulingConfig") or one.get("scheduling") or {}
    return Owned(
        run=run, name=_last(name), kind=kind, where=_last(str(zone)),
        state=str(state.get("state", "") if isinstance(state, dict) else state),
        since=str(one.get("createTime") or one.get("creationTimestamp") or ""), chips=chips, chip=chip,
        spot=bool(scheduling.get("spot")) or scheduling.get("provisioningModel") == "SPOT",
    )  # fmt: skip


def _chips(one: Mapping[str, Any]) -> tuple[str | None, int]:
    """(kind, number) of the chips of a machine, from its accelerator type or its machine type; (None, 0) for others."""
    machine_type, accelerator = _last(str(one.get("machineType", ""))), str(one.get("acceleratorType", ""))
    for chip, machine in MACHINES.items():
        for count, name in machine.machine_types.items():
            if name == machine_type:
                return chip, count
        prefix, _, number = accelerator.rpartition("-")
        if prefix and prefix == machine.accelerator and number.isdigit():
            return chip, int(number) // (2 if machine.counts_cores else 1)
    return None, 0


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _part(path: str, after: str) -> str:
    parts = path.split("/")
    return parts[parts.index(after) + 1] if after in parts[:-1] else ""
