"""From a request to machines that are ready, and from machines to nothing: creation, waiting, zones, deletion."""

from jaxft.errors import PodError
from jaxft.pods.attempts.endings import SAME_ZONE, End
from jaxft.pods.attempts.front import Front
from jaxft.pods.attempts.launch import Launch, Node
from jaxft.pods.gcloud import CapacityError
from jaxft.pods.slices import Phase, Slices, State

SILENT_SECONDS = 1800.0  # for which the API may give no answer
FIRST_PAUSE, LONGEST_PAUSE = 60.0, 1800.0  # seconds between two rounds over all zones


class NoMachines(PodError):
    """No zone has the machines, or the time to wait for them is over."""


class Wished(Exception):
    """Another command has requested to stop or to delete before there was anything to stop."""


def ready(front: Front) -> tuple[Node, Slices]:
    """Machines that are ready: those of the newest node if they are or may be there, else new ones.

    Raises NoMachines with the messages of the API if there are none to be had, Wished, and PodError for a refusal that
    no other zone would change.
    """
    while True:
        node = front.launch.node or _new_node(front)
        slices = front.slices(node)
        under_way = front.launch.attempt is not None and front.launch.attempt.started is not None
        if not under_way and (wish := front.wished()) is not None:
            delete(front, node, slices)
            raise Wished(wish)
        try:
            state = _created(front, node, slices)
        except CapacityError as error:
            state = State(Phase.REFUSED, "REFUSED", str(error))
        if state.phase is Phase.READY:
            if node.ready is None:
                node.ready = front.now()
                front.save()
                front.say(f"node {node.number} in {node.zone} is ready: USD {front.launch.hour_usd:.2f} an hour")
            return node, slices
        if node.ready is not None:  # it was ready once, and has been lost since
            return node, slices
        front.say(f"node {node.number} in {node.zone}: {state.raw}: {state.message or 'no message'}")
        delete(front, node, slices)
        _pause_between_rounds(front, state)


def delete(front: Front, node: Node, slices: Slices) -> None:
    """Deletes all of a node, and returns once the API no longer knows of it. Raises PodError if it cannot."""
    front.say(f"deletes node {node.number} in {node.zone}")
    slices.delete()
    node.deleted = front.now()
    front.save()


def state_or_none(front: Front, slices: Slices, silent: list[float]) -> State | None:
    """The state, or None if the API gives no answer now. silent: when it was first without one, kept by the caller.

    Raises the API's PodError if it has given none for SILENT_SECONDS.
    """
    try:
        state = slices.state()
    except PodError as error:
        if not silent:
            front.say(f"no answer on the state of the machines, asks again: {error}")
            silent.append(front.now())
        if front.now() - silent[0] > SILENT_SECONDS:
            raise
        return None
    silent.clear()
    return state


def next_zone(launch: Launch, zones: tuple[str, ...]) -> str:
    """The zone for a new node: the next one after a refusal, or after SAME_ZONE losses in a row in one zone."""
    at = losses = 0
    for node in launch.nodes:
        if node.zone in zones:
            losses = losses if zones.index(node.zone) == at else 0
            at = zones.index(node.zone)
        ends = [attempt.end for attempt in launch.attempts if attempt.node == node.number]
        losses = losses + 1 if ends and ends[-1] == End.PREEMPTED.value else 0
        if node.ready is None or losses >= SAME_ZONE:
            at, losses = (at + 1) % len(zones), 0
    return zones[at]


def _new_node(front: Front) -> Node:
    if (wish := front.wished()) is not None:
        raise Wished(wish)
    node = Node(
        number=len(front.launch.nodes) + 1, zone=next_zone(front.launch, front.request.zones), requested=front.now()
    )
    front.launch.nodes.append(node)
    front.save()
    return node


def _created(front: Front, node: Node, slices: Slices) -> State:
    """The state of a node once it is neither waiting nor being created. Creates it if nothing is there."""
    silent: list[float] = []
    absent, shown, created = 0, "", False
    while True:
        state = state_or_none(front, slices, silent)
        if state is None:
            front.outside.sleep(front.outside.poll_seconds)
            continue
        if state.raw != shown and state.phase is not Phase.ABSENT:
            front.say(f"node {node.number} in {node.zone}: {state.raw}{f': {state.message}' if state.message else ''}")
            shown = node.raw = state.raw
        if state.phase is Phase.ABSENT and node.ready is None and not created:
            front.say(
                f"creates node {node.number} in {node.zone}: {front.request.shape.describe()}, {front.request.model}"
            )
            _create(front, node, slices)
            created = True
            continue
        absent = absent + 1 if state.phase is Phase.ABSENT else 0
        # Twice, since what was just created may not be listed yet.
        if state.phase in (Phase.READY, Phase.LOST, Phase.REFUSED) or absent > 1:
            return state
        hours = front.request.queue_hours
        if state.phase is Phase.WAITING and hours is not None and front.now() - node.requested > 3600 * hours:
            return State(Phase.REFUSED, state.raw, f"{hours:g} hours of --queue_hours are over")
        if node.ready is None and (wish := front.wished()) is not None:
            delete(front, node, slices)
            raise Wished(wish)
        front.outside.sleep(front.outside.poll_seconds)


def _create(front: Front, node: Node, slices: Slices) -> None:
    try:
        slices.create()
    except CapacityError:
        raise
    except PodError:
        # What is there of it all the same is deleted; if that fails, launch.json still names it for `jaxft pod delete`.
        delete(front, node, slices)
        raise


def _pause_between_rounds(front: Front, state: State) -> None:
    """Waits after each round over all zones, longer from round to round. Raises NoMachines once it is enough."""
    refused: list[Node] = []
    for node in reversed(front.launch.nodes):
        if node.ready is not None:
            break
        refused.append(node)
    rounds, rest = divmod(len(refused), len(front.request.zones))
    hours, waited = front.request.queue_hours, front.now() - refused[-1].requested
    if hours is not None and waited > 3600 * hours:
        raise NoMachines(f"{state.message}. No machines in {hours:g} hours of --queue_hours")
    if rest:
        return
    if hours is None:
        zones = ", ".join(front.request.zones)
        raise NoMachines(f"{state.message or state.raw}. No machines in any zone of --zone ({zones})")
    pause = min(FIRST_PAUSE * 2 ** (rounds - 1), LONGEST_PAUSE)
    front.say(f"waits {pause / 60:.0f} minutes, then tries the zones again")
    front.outside.sleep(pause)
