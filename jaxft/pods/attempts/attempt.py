"""One attempt on machines that are ready: set-up, checks, start, its end, and what is kept of it."""

import json
import tempfile
from pathlib import Path

from jaxft.errors import PodError, counted, listed
from jaxft.pods.attempts.endings import End
from jaxft.pods.attempts.follow import Follower, Outcome
from jaxft.pods.attempts.front import Front
from jaxft.pods.attempts.hosts import HOST_ROOT, LOST_CONNECTION, HostError, Hosts, NoAnswer, differences, shown
from jaxft.pods.attempts.launch import Attempt, Node
from jaxft.pods.attempts.machines import state_or_none
from jaxft.pods.attempts.outputs import LOGS
from jaxft.pods.machines import chips_of_host
from jaxft.pods.slices import Phase, Slices, Worker

SSH_SECONDS = 600.0  # until keys have arrived on a new machine
DISK_BYTES = 5 * 10**9  # free on each host, beyond what is installed
BUSY, NOT_PERMITTED = 16, 77  # exit codes of start.sh and guard.sh
DOCTOR_SECONDS = 300.0
IDLE_MINUTES = 20  # for which nobody looks and nothing is alive, before the watchdogs delete the machines


class Detached(Exception):
    """Training has started, and the front leaves as requested."""


def carry_out(front: Front, node: Node, slices: Slices) -> Attempt:
    """One attempt to its end, which launch.json has then. What was done of it already is not done again.

    Raises Detached after the start if that is requested, and PodError if the cloud gives no answer.
    """
    attempt = _opened(front, node)
    hosts: Hosts | None = None
    try:
        state = slices.state()
        if state.phase is not Phase.READY:
            raise PodError(f"the machines are {state.raw}")
        hosts = front.hosts(slices)
        _prepare(front, hosts, attempt)
        outcome = Follower(front, hosts, attempt).follow()
    except PodError as error:
        outcome = _after_error(front, slices, hosts, error)
        if attempt.started is not None and hosts is not None and outcome.reachable:
            hosts.stop(60)  # what was started on some hosts only
    _close(front, attempt, outcome, hosts if outcome.reachable else None)
    return attempt


def _opened(front: Front, node: Node) -> Attempt:
    """The attempt that has not ended on this node, or a new one."""
    launch = front.launch
    if launch.attempt is not None and launch.attempt.node == node.number:
        return launch.attempt
    before = front.output.newest()
    attempt = Attempt(number=len(launch.attempts) + 1, node=node.number, began=front.now(), step_before=before)
    launch.attempts.append(attempt)
    front.save()
    at = f"from step {before}" if before else "from the start"
    front.say(f"attempt {attempt.number} on node {node.number}, {at}")
    return attempt


def _prepare(front: Front, hosts: Hosts, attempt: Attempt) -> None:
    """From hosts that exist to training that runs. Each part is safe to repeat. Raises HostError or Detached."""
    taken_up = attempt.started is not None
    if not taken_up:
        with hosts.attended():
            _set_up(front, hosts)
        attempt.started = front.now()
        front.save()
    try:
        _start(front, hosts, attempt)
    except HostError as error:
        # A host that was started before may be silent for a while, which is no reason to give up what runs there.
        if not (taken_up and error.code in LOST_CONNECTION):
            raise
    if taken_up:  # --max_hours may be another now
        _guard(front, hosts)
    _upload(front, hosts)
    if front.request.detach:
        raise Detached


def _set_up(front: Front, hosts: Hosts) -> None:
    """From hosts that exist to hosts on which training can start. Raises HostError."""
    hosts.probe(SSH_SECONDS)
    front.say(f"sets up {counted(len(hosts.workers), 'host')} with {front.archive.name}")
    hosts.send(front.archive)
    # Before all that takes long: nobody else deletes the machines if this process is killed now.
    _guard(front, hosts)
    hosts.set_up(front.archive, front.secrets)
    front.output.send(hosts)
    _check(front, hosts)


def _check(front: Front, hosts: Hosts) -> None:
    """Versions equal, chips there, disk free, and the place of the run writable from every host. Raises HostError."""
    states = hosts.states(repeats=True)
    problems = differences(states, chips_of_host(front.request.shape), DISK_BYTES)
    if not problems:
        problems = [problem for problem in hosts.each(lambda worker: _examined(front, hosts, worker)) if problem]
    if problems:
        text = f"the hosts are not ready for a start, and nothing was started:\n{shown(problems)}"
        raise HostError(text, 2, states[0].worker)
    front.say(f"checked {counted(len(states), 'host')}: equal versions, {states[0].chips} chips each, --to is writable")


def _examined(front: Front, hosts: Hosts, worker: Worker) -> str | None:
    """What `jaxft doctor` says against a start on one host; None if nothing."""
    doctor = f"{HOST_ROOT}/runs/{hosts.run}/pack/bin/jaxft"
    argv = [doctor, "doctor", "--json", "--no_devices", f"--output_dir={front.output.output_dir}"]
    done = hosts.repeated(lambda: hosts.slices.ssh(worker, argv, seconds=DOCTOR_SECONDS))
    if done.code == 0:
        return None
    try:
        report = json.loads(done.out[done.out.index("{") :])
        faults = [one for one in report["parts"] if not one["sound"]]
        texts = [f"{one['name']}: {one['text']} {one.get('mend') or ''}".rstrip() for one in faults]
    except (ValueError, KeyError, TypeError):
        texts = [str(hosts.error(worker, argv, done))]
    return f"worker {worker.number}: {listed(texts)}"


def _start(front: Front, hosts: Hosts, attempt: Attempt) -> None:
    """Starts training on every host; where it runs already, nothing happens. Raises HostError."""
    count = len(hosts.workers)
    argv = [
        "jaxft", "train", "--config=config.json", f"--config.output_dir={front.output.output_dir}",
        f"--expect_processes={count}", f"--expect_platform={front.outside.platform}",
    ]  # fmt: skip
    coordinator = f"{hosts.workers[0].address}:{front.outside.port}"

    def one(worker: Worker) -> None:
        of_process = [f"--coordinator={coordinator}", f"--num_processes={count}", f"--process_id={worker.number}"]
        command = [*argv, *(of_process if count > 1 else [])]
        hosts.script(worker, "start.sh", str(attempt.number), "--", *command, seconds=1200)

    hosts.each(one)
    front.say(f"training runs on {counted(count, 'host')}")


def _guard(front: Front, hosts: Hosts) -> None:
    """Starts a watchdog on the first host of each slice, since a slice may be lost with its own. What they cannot do is
    told.
    """
    until = f"--until={int(front.now() + 3600 * front.hours_left())}"

    def one(worker: Worker) -> None:
        if worker.host != 0 or not (flags := hosts.slices.guard_flags(worker.slice)):
            return
        try:
            hosts.script(worker, "guard.sh", *flags, until, f"--idle_minutes={IDLE_MINUTES}")
        except HostError as error:
            front.say(
                f"warning: no watchdog on worker {worker.number}: {error}. If this machine is switched off, the "
                f"machines of the run may stay until `jaxft pod delete {hosts.run}`"
            )

    hosts.each(one)


def _upload(front: Front, hosts: Hosts) -> None:
    """Starts the upload of the logs of all hosts. What it cannot do is told."""

    def upload(worker: Worker) -> None:
        try:
            hosts.script(worker, "upload_logs.sh", str(worker.number), f"--to={front.output.to}")
        except HostError as error:
            front.say(f"warning: logs are not uploaded while the run goes on: {error}")

    if front.output.to is not None:
        hosts.each(upload)


def _after_error(front: Front, slices: Slices, hosts: Hosts | None, error: PodError) -> Outcome:
    """The outcome of an attempt that an error ended: if the machines are lost, that is why."""
    state = state_or_none(front, slices, [])
    if state is not None and state.phase is Phase.READY and isinstance(error, HostError) and error.code != BUSY:
        # What runs on machines that are taken away ends before the API says so.
        front.outside.sleep(front.outside.poll_seconds)
        state = state_or_none(front, slices, [])
    count = len(hosts.workers) if hosts is not None else 0
    if state is None:
        raise error  # the API does not answer: nothing is decided, and the same command takes the run up again
    if state.phase is not Phase.READY:
        return Outcome(End.PREEMPTED, [None] * count, f"the machines are {state.raw}", reachable=False)
    if isinstance(error, HostError) and error.code == BUSY:
        return Outcome(End.BUSY, [None] * count, str(error))
    if isinstance(error, HostError) and error.code in LOST_CONNECTION and not isinstance(error, NoAnswer):
        return Outcome(End.PREEMPTED, [None] * count, str(error), reachable=False)
    if isinstance(error, HostError):
        return Outcome(End.FAILED, [None] * count, str(error))
    raise error


def _close(front: Front, attempt: Attempt, outcome: Outcome, hosts: Hosts | None) -> None:
    """Writes down how an attempt ended, after its logs and, from a host's disk, its run were brought home."""
    step = None
    if hosts is not None:
        save_logs(front, hosts, attempt)
        step = front.bring(hosts)
    attempt.step_after = step if step is not None else front.output.newest()
    attempt.exits, attempt.end, attempt.ended = outcome.exits, outcome.end.value, front.now()
    front.launch.message = outcome.message
    front.save()
    exits = ", ".join("none" if code is None else str(code) for code in outcome.exits)
    front.say(
        f"attempt {attempt.number} ended: {outcome.end.value}, exit codes {exits or 'none'}, newest checkpoint "
        f"{attempt.step_after or 'none'}{': ' + outcome.message if outcome.message else ''}"
    )


def save_logs(front: Front, hosts: Hosts, attempt: Attempt) -> None:
    """Writes the log of every host below --to. What cannot be had is told, and ends nothing."""

    def one(worker: Worker) -> None:
        source = f"{HOST_ROOT}/runs/{hosts.run}/attempts/{attempt.number}/log"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "log"
            done = hosts.repeated(lambda: hosts.slices.fetch(worker, source, path))
            try:
                if done.code != 0:
                    raise hosts.error(worker, ["fetch", source], done)
                front.output.write(log_name(attempt.number, worker.number), path.read_bytes())
            except (PodError, OSError) as error:
                front.say(f"the log of worker {worker.number} was not saved: {error}")

    if attempt.started is not None:
        hosts.each(one)


def log_name(attempt: int, worker: int) -> str:
    """The log of a worker below --to, as upload_logs.sh names it too."""
    return f"{LOGS}/attempt-{attempt}/worker-{worker}.log"
