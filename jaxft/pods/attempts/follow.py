"""Following an attempt on all hosts: its log is shown, and its end, its loss, a hang, a limit or a wish is noticed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxft.errors import ExitCode
from jaxft.pods.attempts.endings import End, classify
from jaxft.pods.attempts.front import Front
from jaxft.pods.attempts.hosts import HOST_ROOT, Hosts, HostState
from jaxft.pods.attempts.launch import Attempt
from jaxft.pods.attempts.machines import state_or_none
from jaxft.pods.slices import Phase
from jaxft.terminal.text import safe_text

PEER_SECONDS = 300.0  # in which peers of a process that failed notice it and end
UNREACHABLE_SECONDS = 900.0  # for which a host of machines that are ready may not answer
FIRST_STEP_MINUTES = 60.0  # without a log line before the first step: weights are loaded and the step is compiled
LOG_BYTES = 200_000  # of worker 0's log that one look shows
BRING_SECONDS = 600.0  # between two times that a new checkpoint is brought home
STEP = re.compile(r"^step (\d+)/", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended. states: of the hosts, as they were last seen. message: the end of the log that says why."""

    end: End
    exits: list[int | None]
    message: str = ""
    reachable: bool = True


@dataclass
class Follower:
    """An attempt that was started. shown: bytes of worker 0's log that were shown. stepped: whether a step was seen.
    killed: whether all had ended, and some by a kill.
    """

    front: Front
    hosts: Hosts
    attempt: Attempt
    shown: int = 0
    stepped: bool = False
    tail: str = ""
    silent: list[float] = field(default_factory=list)
    failed_since: float | None = None
    unreachable_since: float | None = None
    lost: int = 0
    killed: bool = False
    brought: float = 0.0

    def follow(self) -> Outcome:
        """Returns once the attempt has ended, or had to be ended. Raises PodError if the API gives no answer."""
        while (outcome := self.look()) is None:
            self.front.outside.sleep(self.front.outside.poll_seconds)
        return outcome

    def look(self) -> Outcome | None:
        """One look at the machines and all hosts. The outcome, or None while the attempt goes on."""
        front = self.front
        state = state_or_none(front, self.hosts.slices, self.silent)
        # Twice: one wrong answer does not give up machines that work.
        self.lost = self.lost + 1 if state is not None and state.phase is not Phase.READY else 0
        if self.lost > 1 and state is not None:
            text = f"the machines are {state.raw}{f': {state.message}' if state.message else ''}"
            return Outcome(End.PREEMPTED, [None] * len(self.hosts.workers), text, reachable=False)
        states = self.hosts.states(self.attempt.number)
        self._show(states[0])
        if all(one.ended for one in states):
            exits = [one.exit for one in states]
            end = classify(exits, phase=Phase.READY if state is None else state.phase)
            if end is End.FAILED and None in exits and not self.killed:
                # The processes of machines that are taken away end before the API says so: it is asked once more.
                self.killed = True
                return None
            return self._outcome(states, end, exits)
        if (wish := front.wished()) is not None:
            return self._ended_by(states, f"as `jaxft pod {wish}` requested", stopped=True)
        if front.hours_left() <= min(5 / 60, front.request.max_hours / 20):
            return self._ended_by(states, "since --max_hours is used up", out_of_time=True)
        if self._is_unreachable(states):
            problem = next(one.problem for one in states if one.problem)
            return Outcome(End.PREEMPTED, [one.exit for one in states], str(problem), reachable=False)
        if self._has_failed_alone(states):
            return self._ended_by(states, "since another host has failed and it has not ended by itself")
        if self._hangs(states):
            return self._ended_by(states, "since no log has a new line", hung=True)
        self._bring()
        return None

    def _outcome(self, states: Sequence[HostState], end: End, exits: list[int | None]) -> Outcome:
        failed = [one for one in states if one.exit not in (ExitCode.DONE, ExitCode.PEER_LOST)]
        return Outcome(end, exits, self._reason(failed or list(states)) if end is not End.DONE else "")

    def _reason(self, states: Sequence[HostState]) -> str:
        """What the log of the first of these hosts ends with: the message of jaxft, if there is one."""
        worker = self.hosts.workers[states[0].worker]
        offset = max(0, states[0].log_bytes - 4000)
        argv = ["bash", f"{HOST_ROOT}/worker/log.sh", self.hosts.run, str(self.attempt.number), str(offset)]
        lines = self.hosts.slices.ssh(worker, argv).out.splitlines() or [states[0].last_line]
        start = max((i for i, line in enumerate(lines) if line.startswith("jaxft train: ")), default=len(lines) - 3)
        return f"worker {worker.number}: " + safe_text("\n".join(lines[max(0, start) :]))

    def _ended_by(
        self,
        states: Sequence[HostState],
        why: str,
        *,
        hung: bool = False,
        stopped: bool = False,
        out_of_time: bool = False,
    ) -> Outcome:
        """Stops the attempt on every host, by which it saves, and returns the outcome."""
        self.front.say(f"stops attempt {self.attempt.number} {why}")
        if hung:
            self._dump(states)
        for problem in self.hosts.stop(60 if hung else 300):
            self.front.say(problem)
        running = {one.worker for one in states if not one.ended}
        ended = self.hosts.states(self.attempt.number, repeats=True)
        exits = [one.exit for one in ended]
        if not (hung or stopped or out_of_time):
            # A 75 that this stop has caused says nothing of the reason: the host that failed before does.
            exits = [
                int(ExitCode.PEER_LOST) if one.worker in running and one.exit == ExitCode.PREEMPTED else one.exit
                for one in ended
            ]
        end = classify(exits, hung=hung, stopped=stopped, out_of_time=out_of_time)
        return self._outcome(ended, end, exits)

    def _dump(self, states: Sequence[HostState]) -> None:
        """Shows where the processes of each host are, where py-spy is there."""
        for one in states:
            if one.alive:
                argv = ["bash", f"{HOST_ROOT}/worker/dump.sh", self.hosts.run]
                out = self.hosts.slices.ssh(self.hosts.workers[one.worker], argv, seconds=60).out.strip()
                self.front.say(f"worker {one.worker}: {safe_text(out) or 'no process shows where it is'}")

    def _show(self, state: HostState) -> None:
        """Shows the new lines of worker 0's log. A line that is not ended yet waits for its end."""
        while state.problem is None and state.log_bytes > self.shown:
            count = min(LOG_BYTES, state.log_bytes - self.shown)
            argv = [str(self.attempt.number), str(self.shown), str(count)]
            done = self.hosts.slices.ssh(
                self.hosts.workers[0], ["bash", f"{HOST_ROOT}/worker/log.sh", self.hosts.run, *argv]
            )
            if done.code != 0:
                return
            self.shown += count
            *lines, self.tail = (self.tail + done.out).split("\n")
            for line in lines:
                self.front.say(safe_text(line.rpartition("\r")[2]))
            self.stepped = self.stepped or STEP.search(done.out) is not None

    def _is_unreachable(self, states: Sequence[HostState]) -> bool:
        if all(one.problem is None for one in states) or self.silent:
            self.unreachable_since = None
            return False
        since = self.unreachable_since = self.unreachable_since or self.front.now()
        return self.front.now() - since > UNREACHABLE_SECONDS

    def _has_failed_alone(self, states: Sequence[HostState]) -> bool:
        if not any(one.ended and one.exit != ExitCode.DONE for one in states):
            self.failed_since = None
            return False
        since = self.failed_since = self.failed_since or self.front.now()
        return self.front.now() - since > PEER_SECONDS

    def _hangs(self, states: Sequence[HostState]) -> bool:
        # Only process 0 writes much, so that the newest line of all hosts counts.
        ages = [one.log_age for one in states if one.log_age is not None and one.problem is None]
        minutes = self.front.request.stall_minutes
        limit = minutes if self.stepped else max(minutes, FIRST_STEP_MINUTES)
        return bool(ages) and min(ages) > 60 * limit

    def _bring(self) -> None:
        """Brings a run home from a host's disk now and then, so that a lost node does not take it along."""
        if self.front.output.to is None and self.front.now() - self.brought > BRING_SECONDS:
            self.brought = self.front.now()
            self.front.bring(self.hosts)
