"""`jaxft pod stop` and `delete`: the end of a run, or of all that exists of it."""

import time
from typing import Any

from jaxft.errors import PodError
from jaxft.files.locks.lock import owner_now
from jaxft.pods import command
from jaxft.pods.attempts.front import Front, Outside
from jaxft.pods.attempts.launch import Records, folder_of
from jaxft.pods.attempts.lead import lead, summary_of
from jaxft.pods.command import Run
from jaxft.pods.commands.record import Say, front_of, outside_of
from jaxft.pods.owned import delete_owned, owned
from jaxft.pods.run import led

END_SECONDS = 1200.0  # for which `stop` waits for the process that leads the run


def stop(
    name: str, *, project: str | None = None, say: Say, run: Run = command.run, outside: Outside | None = None
) -> dict[str, Any]:
    """Ends a run so that it can go on later: SIGTERM, by which it saves, then its machines are deleted."""
    front = front_of(name, project, outside or outside_of(say, run))
    if front.launch.state != "open":
        say(f"run {name} has ended already: {front.launch.state}")
        return summary_of(front)
    front.records.set_wish("stop")
    leader = owner_now(front.records.folder, inside=True)
    if leader is None:
        with led(name):
            front = front_of(name, project, front.outside)  # as the process left it that led the run until now
            if front.launch.state == "open":
                front.records.set_wish("stop")
                return lead(front)
            return summary_of(front)
    say(f"{leader.describe()} leads run {name}, and stops it")
    return _awaited(front)


def delete(
    name: str, *, project: str | None = None, say: Say, run: Run = command.run, outside: Outside | None = None
) -> dict[str, Any]:
    """Deletes at once all that exists of a run in the cloud, by its label, and nothing else. Checkpoints stay.

    Raises PodError if something of it is still there afterwards, or if there is nothing of that name at all.
    """
    sleep = time.sleep if outside is None else outside.sleep
    records = Records(folder_of(name))
    launch = records.read()
    if launch is not None:
        project = project or launch.request.get("project")
        records.set_wish("delete")
    things = owned(project, run, name=name)
    if not things and launch is None:
        raise PodError(
            f"nothing has the label of a run {name!r}, and this machine has no record of it: `jaxft pod list` "
            "shows what "
            "exists; give --project=P for another project"
        )
    for one in things:
        say(f"deletes {one.kind.name} {one.name} {one.where}")
    delete_owned(things, project, sleep, run)
    rest = owned(project, run, name=name)
    if rest:
        raise PodError(
            f"still there: {', '.join(one.name for one in rest)}. Give the same command again: they cost money"
        )
    if launch is None:
        say(f"nothing of run {name} is left")
        return {"name": name, "deleted": len(things)}
    leader = owner_now(records.folder, inside=True)
    if leader is not None:
        say(f"{leader.describe()} leads run {name}, and ends by itself")
        return {"name": name, "deleted": len(things)}
    with led(name):
        front = front_of(name, project, outside or outside_of(say, run))
        now = front.now()
        for node in front.launch.nodes:
            node.deleted = now if node.deleted is None else node.deleted
        if front.launch.state == "open":
            front.launch.state, front.launch.message = "deleted", ""
        front.save()
        records.set_wish(None)
    say(f"nothing of run {name} is left: {front.launch.hours(now):.2f} h, USD {front.launch.usd(now):.2f} in all")
    return summary_of(front) | {"deleted": len(things)}


def _awaited(front: Front) -> dict[str, Any]:
    """The figures of a run once the process that leads it has ended it."""
    until = front.now() + END_SECONDS
    while front.now() < until:
        launch = Records(front.records.folder).read()
        if launch is not None and launch.state != "open":
            front.launch = launch
            return summary_of(front)
        front.outside.sleep(min(5.0, front.outside.poll_seconds))
    raise PodError(
        f"run {front.launch.name} has not ended in {END_SECONDS / 60:.0f} minutes: see `jaxft pod status`, or end "
        "it with "
        f"`jaxft pod delete {front.launch.name}`, which saves nothing more"
    )
