"""A run that is on record, as another terminal sees it."""

from collections.abc import Callable

from jaxft.pods.attempts.front import Front, Outside
from jaxft.pods.attempts.hosts import Hosts
from jaxft.pods.attempts.launch import NAME, Records, folder_of, opened
from jaxft.pods.attempts.outputs import keep_copy, output_of
from jaxft.pods.command import Run
from jaxft.pods.providers import slices_of
from jaxft.pods.request import Request
from jaxft.pods.slices import Phase, State

Say = Callable[[str], None]


def outside_of(say: Say, run: Run) -> Outside:
    """The real cloud."""
    return Outside(say=say, slices_of=slices_of, run=run)


def front_of(name: str, project: str | None, outside: Outside) -> Front:
    """The front of a run that is on record, without its secrets: nothing new is set up with it."""
    launch = opened(name)
    # Only the command that starts a run may leave it.
    request = Request.from_json(launch.request | {"detach": False} | ({"project": project} if project else {}))
    output = output_of(request)
    folder = folder_of(name)
    return Front(
        request=request, launch=launch, records=Records(folder, keep_copy(output, NAME)), output=output,
        archive=folder / launch.archive, outside=outside,
    )  # fmt: skip


def machines_of(front: Front) -> tuple[State, Hosts | None]:
    """The state of the run's machines, and their hosts if they can be reached."""
    node = front.launch.node
    if node is None:
        return State(Phase.ABSENT, "none"), None
    slices = front.slices(node)
    state = slices.state()
    return state, front.hosts(slices) if state.phase is Phase.READY else None
