"""From one attempt to the next, until the run is complete or another attempt would not help; then the deletion."""

import contextlib
from typing import Any

from jaxft.errors import CheckpointError, PodError, counted
from jaxft.pods.attempts.attempt import Detached, carry_out
from jaxft.pods.attempts.endings import End, Next, next_after
from jaxft.pods.attempts.front import Front
from jaxft.pods.attempts.launch import Attempt
from jaxft.pods.attempts.machines import NoMachines, Wished, delete, ready
from jaxft.pods.attempts.outputs import HostDisk, Mounted

LOOK_SECONDS = 60.0  # between two looks at machines that are kept
WELL = {End.DONE.value, End.STOPPED.value, "deleted"}


def lead(front: Front) -> dict[str, Any]:
    """Leads a run to its end and deletes its machines. Returns its figures; raises PodError if it did not end well.

    With --detach it returns once training has started. A process that is killed here at any moment is replaced by
    the same command.
    """
    launch = front.launch
    try:
        while launch.state == "open":
            last = launch.attempts[-1] if launch.attempts else None
            if last is None or last.end is None or last.number <= launch.closed_attempts or last.handled:
                node, slices = ready(front)
                last = carry_out(front, node, slices)
            _draw_consequences(front, last)
    except Detached:
        front.say(
            f"training runs, and this command leaves as --detach requests. `jaxft pod status {launch.name}` shows it; "
            "the same command without --detach follows it, starts it again after a preemption and deletes the "
            "machines "
            f"at the end; until then they cost USD {launch.hour_usd:.2f} an hour"
        )
    except KeyboardInterrupt:
        if not _deletes(front):
            raise
        return lead(front)
    except NoMachines as error:
        _end(front, End.NO_MACHINES.value, str(error))
        raise
    except Wished as wish:
        if launch.attempt is not None:
            launch.attempt.end, launch.attempt.ended = End.STOPPED.value, front.now()
        _end(front, "deleted" if str(wish) == "delete" else End.STOPPED.value, "before training had started")
    except PodError as error:
        if launch.node is None and launch.state == "open":
            _end(front, End.FAILED.value, str(error))
        if launch.node is not None:
            error.add_note(
                f"Machines of this run may exist, at USD {launch.hour_usd:.2f} an hour: the same command takes the run "
                f"up, and `jaxft pod delete {launch.name}` deletes them."
            )
        raise
    if launch.state not in {"open", *WELL}:
        raise PodError(f"run {launch.name} ended: {launch.state}: {launch.message}")
    return summary_of(front)


def summary_of(front: Front) -> dict[str, Any]:
    """The figures of a run, for --json."""
    launch, now = front.launch, front.now()
    last = launch.attempts[-1] if launch.attempts else None
    return {
        "name": launch.name, "state": launch.state, "to": front.request.to, "attempts": len(launch.attempts),
        "nodes": len(launch.nodes), "step": None if last is None else last.step_after,
        "hours": launch.hours(now), "usd": launch.usd(now),
    }  # fmt: skip


def _deletes(front: Front) -> bool:
    """After Ctrl-C: whether the run is to be stopped and its machines deleted. Without an answer they are left."""
    launch = front.launch
    answer = ""
    if front.outside.ask is not None:
        with contextlib.suppress(KeyboardInterrupt, EOFError):
            answer = front.outside.ask(
                f"Run {launch.name} costs USD {launch.hour_usd:.2f} an hour while its machines exist. Leave it "
                "running (l), "
                "or stop it, which saves, and delete its machines (d)? [l] "
            )
    if answer.strip().lower() in ("d", "delete"):
        front.records.set_wish("delete")
        return True
    front.say(
        f"run {launch.name} is left as it is, at USD {launch.hour_usd:.2f} an hour while its machines exist. The "
        "same command "
        f"takes it up; `jaxft pod stop {launch.name}` saves and deletes, `jaxft pod delete {launch.name}` deletes "
        "at once"
    )
    return False


def _draw_consequences(front: Front, attempt: Attempt) -> None:
    """What follows the end of an attempt: the deletion of its machines, and the end of the run or another attempt.

    All of it follows from launch.json, so that a front that was killed in its middle does it again.
    """
    launch, end = front.launch, End(str(attempt.end))
    used = len(launch.attempts) - launch.closed_attempts
    if front.wished() is not None and end is not End.DONE:
        end = End.STOPPED
    step = next_after(end, progress=attempt.progress, idle=launch.idle(), retries_left=front.request.retries + 1 - used)
    front.say(f"attempt {attempt.number} is {end.value}: {step.why}")
    if not step.retry and end is End.DONE:
        _bring_whole(front)
    if launch.node is not None and (step.new_node or not step.retry):
        if step.keep and not step.retry:
            _keep(front)
        delete(front, launch.node, front.slices(launch.node))
    if step.retry:
        attempt.handled = True
        front.save()
        return
    reason = f"{launch.message}\n{_sentence(step)}" if launch.message else _sentence(step)
    state = "deleted" if end is End.STOPPED and front.wished() == "delete" else end.value
    _end(front, state, reason)


def _sentence(step: Next) -> str:
    return f"No other attempt follows: {step.why}."


def _end(front: Front, state: str, message: str) -> None:
    launch = front.launch
    launch.state, launch.message = state, message
    front.save()
    front.records.set_wish(None)
    hours = launch.hours(front.now())
    used = f"{counted(len(launch.attempts), 'attempt')} on {counted(len(launch.nodes), 'node')}"
    cost = f"{hours:.2f} h, USD {launch.usd(front.now()):.2f}"
    front.say(f"run {launch.name}: {state} after {used}, {cost}; results in {front.request.to}")


def _bring_whole(front: Front) -> None:
    """After a complete run: what is on a host's disk is here and whole before the disk is deleted. Raises PodError."""
    launch = front.launch
    if launch.fetched or not isinstance(front.output, HostDisk):
        return
    node = launch.node
    if node is None:
        raise PodError(f"run {launch.name} is complete, but its machines were deleted before it was brought home")
    front.output.bring(front.hosts(front.slices(node)))
    if not front.request.dry_run:
        verify_run(front.output.at_home)
    launch.fetched = True
    front.save()


def verify_run(output: Mounted) -> None:
    """Raises PodError if `jaxft verify` would name anything broken in the run folder.

    What the run read is on the hosts, or would have to be fetched here, so that it is left out.
    """
    from jaxft.runs.survey.findings import BROKEN
    from jaxft.runs.survey.verify import verify

    try:
        findings = verify(output.output_dir, reads=False)
    except CheckpointError as error:
        raise PodError(f"{output.output_dir} is not the whole run: {error}") from error
    if not findings.is_whole:
        broken = next(one for one in findings.all if one.state == BROKEN)
        raise PodError(f"{output.output_dir} is not whole: {broken.part}: {broken.text}. Give the same command again")


def _keep(front: Front) -> None:
    """Leaves machines for a while after an error, so that somebody can look. `jaxft pod delete` ends it earlier."""
    node, minutes = front.launch.node, front.request.keep_minutes
    if node is None or not minutes or front.request.dry_run:
        return
    slices = front.slices(node)
    hosts = front.hosts(slices)
    front.say(
        f"keeps node {node.number} ({hosts.workers[0].node}, {node.zone}) for {minutes:g} minutes, so that you "
        "can look "
        f"at it; `jaxft pod delete {front.launch.name}` deletes it at once"
    )
    until = front.now() + 60 * minutes
    while front.now() < until and front.wished() is None and front.hours_left() > 0:
        hosts.states()  # by which the watchdog sees that somebody looks
        front.outside.sleep(LOOK_SECONDS)
