"""The state of all slices of a node, from the states of their parts."""

from collections.abc import Sequence
from typing import Any

from jaxft.pods.slices import Phase, State

# The worst first: the whole is in the state of its worst part.
WORST = (Phase.REFUSED, Phase.LOST, Phase.DELETING, Phase.ABSENT, Phase.WAITING, Phase.CREATING, Phase.READY)


def whole(states: Sequence[State]) -> State:
    """The worst of the states; if only some parts are absent, the whole is lost. states: one at least."""
    worst = min(states, key=lambda state: WORST.index(state.phase))
    maintenance = next((state.maintenance for state in states if state.maintenance), None)
    if worst.phase == Phase.ABSENT and any(state.phase != Phase.ABSENT for state in states):
        parts = sum(state.phase == Phase.ABSENT for state in states)
        return State(Phase.LOST, "absent", f"{parts} of {len(states)} parts are gone", maintenance)
    return State(worst.phase, worst.raw, worst.message, maintenance)


def maintenance_of(upcoming: Any) -> str | None:
    """When maintenance begins, from the API's field upcomingMaintenance; None without one."""
    if not isinstance(upcoming, dict):
        return str(upcoming) if upcoming else None
    start = upcoming.get("windowStartTime") or upcoming.get("latestWindowStartTime")
    return str(start) if start else None
