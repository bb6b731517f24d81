"""What the end of an attempt means, and whether another attempt follows."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from jaxft.errors import ExitCode
from jaxft.pods.slices import Phase

LOST_WITHOUT_PROGRESS = 2  # nodes in a row that may be lost before a new checkpoint, and are replaced
SAME_ZONE = 3  # nodes in a row that one zone may lose, before the next zone is tried


class End(Enum):
    """How an attempt ended. The value stands in launch.json."""

    DONE = "done"
    REFUSED = "refused"  # by jaxft: the config, the data, or something that the machine lacks
    PREEMPTED = "preempted"  # the node was taken, or stopped by SIGTERM
    FAILED = "failed"  # an error of the program, or a kill
    HUNG = "hung"  # no new line in any log
    BUSY = "busy"  # the chips are held by another process
    STOPPED = "stopped"  # by `jaxft pod stop`
    LIMIT = "limit"  # --max_hours
    NO_MACHINES = "no machines"  # no capacity, or no quota


@dataclass(frozen=True)
class Next:
    """What follows an attempt. retry: another attempt. new_node: on new machines. keep: first leave the machines there
    for a while, so that somebody can look. why: for the user, as the end of a sentence that begins with the end.
    """

    retry: bool
    why: str
    new_node: bool = True
    keep: bool = False


def classify(
    exits: Sequence[int | None], *, phase: Phase = Phase.READY, hung: bool = False, stopped: bool = False,
    out_of_time: bool = False,
) -> End:  # fmt: skip
    """How an attempt ended.

    exits: the exit code of each worker, None for one that has none, because it was killed, hangs or cannot be reached.
    phase: of the machines at the end. hung: whether it was stopped for a lack of log lines. stopped, out_of_time:
    whether it was stopped by the user, or at the limit of hours.
    """
    if exits and all(code == ExitCode.DONE for code in exits):
        return End.DONE
    if ExitCode.REFUSED in exits:
        return End.REFUSED
    if stopped or out_of_time:
        return End.STOPPED if stopped else End.LIMIT
    if phase is not Phase.READY:
        return End.PREEMPTED
    if hung:
        return End.HUNG
    if ExitCode.PREEMPTED in exits:
        return End.PREEMPTED
    # A process that lost its peers says nothing of the cause: the codes of the peers do.
    if any(code not in (ExitCode.DONE, ExitCode.PEER_LOST) for code in exits):
        return End.FAILED
    return End.PREEMPTED


def next_after(end: End, *, progress: bool, idle: int, retries_left: int) -> Next:
    """What follows an attempt.

    progress: whether the newest whole checkpoint is newer than at its start. idle: attempts in a row without progress,
    with this one. retries_left: of --retries.
    """
    if end is End.DONE:
        return Next(False, "the run is complete")
    if end is End.REFUSED:
        return Next(False, "the same command would be refused again: correct what the message names")
    if end is End.STOPPED:
        return Next(False, "it was stopped as requested; the same `jaxft pod run` goes on from the newest checkpoint")
    if end is End.LIMIT:
        return Next(False, "the hours of --max_hours are used up; with more, the same command goes on")
    if end is End.NO_MACHINES:
        return Next(False, "no zone has the machines now: name more zones, or wait for them with --queue_hours")
    keep = end in (End.FAILED, End.HUNG)
    if retries_left <= 0:
        why = "the attempts of --retries are used up; the same command goes on with as many more"
        return Next(False, why, keep=keep)
    if progress:
        return Next(True, "there is a newer checkpoint than before, so another attempt follows", new_node=not keep)
    if end in (End.PREEMPTED, End.BUSY) and idle <= LOST_WITHOUT_PROGRESS:
        # Chips that are held become free where their holder ends; the second time only new machines help.
        same = end is End.BUSY and idle < LOST_WITHOUT_PROGRESS
        return Next(True, "another attempt follows, though there is no newer checkpoint than before", new_node=not same)
    why = "it has brought no newer checkpoint, so that another attempt would end alike"
    if idle > 1:
        why = (
            f"{idle} attempts in a row have brought no newer checkpoint: see the log, and save more often with a "
            "smaller checkpoint.every"
        )
    return Next(False, why, keep=keep)
