"""All hosts of a node: what is done on each is done on all in parallel, and repeated after a lost connection."""

import contextlib
import json
import re
import secrets
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from jaxft.errors import PodError, listed
from jaxft.pods.command import TIMED_OUT, Done
from jaxft.pods.slices import Slices, Worker
from jaxft.terminal.text import safe_line

HOST_ROOT = "jaxft-pod"  # below the home folder of a host
LOST_CONNECTION = (255, TIMED_OUT)  # the codes of ssh without a connection, and of a time limit
REPEATS = 5  # of a command whose connection broke
PAUSE_SECONDS = 10.0
LOOK_SECONDS = 300.0  # between two looks while something takes long
THREADS = 64
LINES = 6  # of a host's error that are shown

Result = TypeVar("Result")


class HostError(PodError):
    """A command on a host failed. code: of the command, or of the connection. worker: the host's number."""

    def __init__(self, message: str, code: int, worker: int) -> None:
        super().__init__(message)
        self.code, self.worker = code, worker


class NoAnswer(HostError):
    """A new host has never answered over ssh, for which another host would hardly be better."""


@dataclass(frozen=True, kw_only=True)
class HostState:
    """What state.sh says of one host, or why it says nothing.

    alive: whether the attempt's command runs. exit: its exit code once it has ended. log_age: seconds since the last
    line of its log, None without a log. environment: a digest of the installed versions. problem: why the host could
    not be reached.
    """

    worker: int
    attempt: int = 0
    alive: bool = False
    exit: int | None = None
    last_line: str = ""
    log_age: float | None = None
    log_bytes: int = 0
    chips: int = 0
    holders: list[dict[str, Any]] = field(default_factory=list)
    disk_free: int = 0
    environment: str | None = None
    problem: str | None = None

    @property
    def ended(self) -> bool:
        """Whether an attempt was started there and is over."""
        return self.problem is None and self.attempt > 0 and not self.alive


@dataclass(frozen=True)
class Hosts:
    """run: the name of the run. sleep: waits so many seconds; a test's clock replaces it. threads: hosts at a time."""

    slices: Slices
    workers: tuple[Worker, ...]
    run: str
    sleep: Callable[[float], None] = time.sleep
    threads: int = THREADS

    def each(self, work: Callable[[Worker], Result]) -> list[Result]:
        """The results of `work` for every host, in their order. Raises the error of the first host that failed."""
        with ThreadPoolExecutor(min(self.threads, len(self.workers))) as pool:
            return list(pool.map(work, self.workers))

    def on(self, worker: Worker, argv: Sequence[str], *, stdin: bytes = b"", seconds: float = 120) -> str:
        """The output of a command that is safe to repeat. Raises HostError with the end of what it wrote."""
        done = self.repeated(lambda: self.slices.ssh(worker, argv, stdin=stdin, seconds=seconds))
        if done.code != 0:
            raise self.error(worker, argv, done)
        return done.out

    def script(self, worker: Worker, name: str, *arguments: str, stdin: bytes = b"", seconds: float = 120) -> str:
        """The output of a script of tpu_scripts/worker on a host. Raises HostError."""
        return self.on(
            worker, ["bash", f"{HOST_ROOT}/worker/{name}", self.run, *arguments], stdin=stdin, seconds=seconds
        )

    def repeated(self, call: Callable[[], Done]) -> Done:
        """Calls until the connection holds to the end, REPEATS times at most."""
        for _ in range(REPEATS - 1):
            done = call()
            if done.code not in LOST_CONNECTION:
                return done
            self.sleep(PAUSE_SECONDS)
        return call()

    def error(self, worker: Worker, argv: Sequence[str], done: Done) -> HostError:
        """The error of a command that failed on a host."""
        written = [line for line in (done.err + "\n" + done.out).splitlines() if line.strip()]
        text = "; ".join(safe_line(line) for line in written[-LINES:]) or "no message"
        what = "the connection broke" if done.code in LOST_CONNECTION else f"exit code {done.code}"
        return HostError(
            f"worker {worker.number} ({worker.node}), {safe_line(shlex.join(argv[:4]))}: {what}: {text}",
            done.code, worker.number,
        )  # fmt: skip

    def probe(self, seconds: float) -> None:
        """Returns once every host answers over ssh: keys arrive there some time after the machine. Raises NoAnswer."""

        def until_it_answers(worker: Worker) -> None:
            argv = ("true",)
            waited = 0.0
            while (done := self.slices.ssh(worker, argv, seconds=60)).code != 0:
                if waited >= seconds:
                    raise NoAnswer(
                        f"{self.error(worker, argv, done)}. No answer over ssh in {seconds / 60:.0f} minutes: "
                        "allow port "
                        "22 in the network's firewall, or reach the hosts with --internal_ip or --iap",
                        done.code, worker.number,
                    )  # fmt: skip
                self.sleep(PAUSE_SECONDS)
                waited += PAUSE_SECONDS

        self.each(until_it_answers)

    def send(self, archive: Path) -> None:
        """Brings the archive to every host, and unpacks its scripts. What is there already stays. Raises HostError."""
        digest = archive.name.removeprefix("jaxft-").removesuffix(".tar.gz")
        target = f"{HOST_ROOT}/{archive.name}"

        def one(worker: Worker) -> None:
            self.on(worker, ["mkdir", "-p", HOST_ROOT])
            present = self.repeated(lambda: self.slices.ssh(worker, ["sha256sum", target]))
            if present.code != 0 or not present.out.startswith(digest):
                copied = self.repeated(lambda: self.slices.copy(worker, archive, target))
                if copied.code != 0:
                    raise self.error(worker, ["copy", target], copied)
            self.on(worker, ["tar", "-xzf", target, "-C", HOST_ROOT, "worker"])

        self.each(one)

    def set_up(self, archive: Path, values: Mapping[str, str]) -> None:
        """Installs an archive that was sent to every host. Raises HostError.

        values: environment variables of the run, which go to a file of mode 600 over standard input alone.
        """

        def one(worker: Worker) -> None:
            if values:
                self._send_values(worker, values)
            self.script(worker, "setup.sh", f"{HOST_ROOT}/{archive.name}", seconds=3600)

        self.each(one)

    def _send_values(self, worker: Worker, values: Mapping[str, str]) -> None:
        mark = secrets.token_hex(8)
        lines = [f"export {key}={shlex.quote(value)}" for key, value in values.items()]
        content = "\n".join([*lines, f"# {mark}", ""]).encode()
        for _ in range(REPEATS):
            # A repeated connection comes with nothing on its standard input, which the script refuses.
            try:
                self.script(worker, "secrets.sh", mark, stdin=content)
                return
            except HostError as error:
                last = error
                self.sleep(PAUSE_SECONDS)
        raise last

    def states(self, attempt: int | None = None, *, repeats: bool = False) -> list[HostState]:
        """What each host says of an attempt, or of its newest. A host that cannot be reached has a `problem`.

        repeats: whether a lost connection is tried again at once, and not left to the next look.
        """
        number = [] if attempt is None else [str(attempt)]

        def one(worker: Worker) -> HostState:
            argv = ["bash", f"{HOST_ROOT}/worker/state.sh", self.run, *number]

            def call() -> Done:
                return self.slices.ssh(worker, argv, seconds=60)

            done = self.repeated(call) if repeats else call()
            state = parse_state(worker.number, done.out)
            if done.code != 0 or state is None:
                return HostState(worker=worker.number, problem=str(self.error(worker, argv, done)))
            return state

        return self.each(one)

    @contextlib.contextmanager
    def attended(self) -> Iterator[None]:
        """Looks at the hosts now and then until it is left, so that watchdogs see that somebody works there."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(LOOK_SECONDS):
                self.states()

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def stop(self, seconds: int = 300) -> list[str]:
        """SIGTERM to the run on every host, by which it saves; SIGKILL after so many seconds. Returns the problems."""

        def one(worker: Worker) -> str | None:
            try:
                self.script(worker, "stop.sh", str(seconds), seconds=seconds + 120)
            except HostError as error:
                return str(error)
            return None

        return [problem for problem in self.each(one) if problem is not None]


def parse_state(worker: int, out: str) -> HostState | None:
    """The state of a host from the output of state.sh, before which gcloud may write lines; None without one."""
    for line in reversed(out.splitlines()):
        if not re.match(r"\s*\{", line):
            continue
        try:
            values = json.loads(line)
            names = HostState.__dataclass_fields__.keys() - {"worker", "problem"}
            return HostState(worker=worker, **{key: values[key] for key in names & values.keys()})
        except (ValueError, TypeError):
            return None
    return None


def differences(states: Sequence[HostState], chips: int, disk: int) -> list[str]:
    """What keeps hosts from a start: other versions than worker 0's, missing chips, held chips, a full disk.

    chips: that each host must have. disk: free bytes that each must have.
    """
    problems = []
    for state in states:
        name = f"worker {state.worker}"
        if state.problem is not None:
            problems.append(state.problem)
            continue
        if state.environment is None:
            problems.append(f"{name} is not set up")
        elif state.environment != states[0].environment:
            problems.append(f"{name} has other versions of libraries than worker {states[0].worker}")
        if state.chips != chips:
            problems.append(f"{name} has {state.chips} chips of the {chips} that its machine type has")
        if state.disk_free < disk:
            problems.append(
                f"{name} has {state.disk_free / 1e9:.1f} GB of free disk, and {disk / 1e9:.0f} GB are needed: --disk_gb"
            )
    return problems


def shown(problems: Sequence[str]) -> str:
    """Problems of hosts as lines of one message."""
    return listed(problems, lines=True)
