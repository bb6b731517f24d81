"""Slices without a cloud: a worker is a HOME folder, `ssh` runs commands there, and a test decides what fails."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jaxft.errors import PodError
from jaxft.pods.command import TIMED_OUT, Done
from jaxft.pods.slices import Phase, State, Worker

ROOT = "jaxft-pod"  # the folder under HOME in which the scripts of tpu_scripts/worker keep everything
BROKEN = Done(255, "", "Connection to worker closed by remote host.\n")
# How a connection breaks: the command never ran; it was cut off in its middle; it ran, and its answer is lost.
BEFORE, MIDDLE, AFTER = "before", "middle", "after"
Break = Callable[[str, Worker, Sequence[str]], str | None]


class StubSlices:
    """Implements jaxft.pods.slices.Slices with folders under `folder`, one for each worker.

    hosts: the number of hosts of each slice. states: what `state` answers, call by call; the last one stays. After
    `delete` it is ABSENT, whatever they say. breaks: called with ("ssh", "copy" or "fetch", worker, argv) before each
    call; it returns how the connection breaks, or None. Unlike gcloud, a broken `ssh` is not repeated here: it returns
    255.
    env: added to the environment of every command on a worker; None as a value takes a variable out. chips: the number
    of device files that a worker has, which a process may open. guard: what `guard_flags` answers.
    events: every call that reached the cloud or a worker, such as "create", "ssh 0 start.sh r1 1" and "delete".
    """

    alive = False

    def __init__(
        self,
        folder: Path,
        *,
        hosts: Sequence[int] = (2,),
        states: Sequence[State] = (State(Phase.READY, "READY"),),
        breaks: Break = lambda kind, worker, argv: None,
        env: Mapping[str, str | None] | None = None,
        chips: int = 0,
        guard: Sequence[str] = (),
    ) -> None:
        self.folder, self.hosts, self.states, self.breaks = folder, tuple(hosts), list(states), breaks
        self.env, self.chips, self.guard = env or {}, chips, tuple(guard)
        self.events: list[str] = []
        self.incarnation = 0  # each creation has new, empty disks

    # The protocol.

    def create(self) -> None:
        self.events.append("create")
        if self.alive:
            return
        self.incarnation += 1
        for worker in self._all():
            devices = self.home(worker) / "dev"
            devices.mkdir(parents=True)
            for number in range(self.chips):
                (devices / f"accel{number}").touch()
        self.alive = True

    def state(self) -> State:
        if not self.alive:
            return State(Phase.ABSENT, "NOT_FOUND")
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def workers(self) -> tuple[Worker, ...]:
        if not self.alive:
            raise PodError("the slice is not there")
        return self._all()

    def ssh(self, worker: Worker, argv: Sequence[str], *, stdin: bytes = b"", seconds: float = 120) -> Done:
        broken = self.breaks("ssh", worker, argv)
        if not self.alive or broken == BEFORE:
            return BROKEN
        self.events.append(f"ssh {worker.number} {self._short(argv)}")
        # As with sshd, the call ends once nobody holds the pipes: a script that detaches something must let go of them.
        # And no signal is ignored, as Ctrl-C is in a suite that a shell put in the background.
        process = subprocess.Popen(
            ["env", "--default-signal=HUP,INT", *argv], cwd=self.home(worker), env=self.environment(worker),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        limit = 0.15 if broken == MIDDLE else seconds
        try:
            out, err = process.communicate(stdin, timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGHUP)
            process.communicate()
            return BROKEN if broken else Done(TIMED_OUT, "", f"no end after {seconds:g} s")
        return BROKEN if broken else Done(process.returncode, out.decode(), err.decode())

    def copy(self, worker: Worker, source: Path, target: str) -> Done:
        broken = self.breaks("copy", worker, [str(source), target])
        if not self.alive or broken == BEFORE:
            return BROKEN
        self.events.append(f"copy {worker.number} {target}")
        path = self.home(worker) / target
        path.parent.mkdir(parents=True, exist_ok=True)
        if broken == MIDDLE:
            path.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
        else:
            shutil.copyfile(source, path)
        return BROKEN if broken else Done(0, "", "")

    def fetch(self, worker: Worker, source: str, target: Path) -> Done:
        broken = self.breaks("fetch", worker, [source, str(target)])
        if not self.alive or broken == BEFORE:
            return BROKEN
        self.events.append(f"fetch {worker.number} {source}")
        path = self.home(worker) / source
        if not path.is_file():
            return Done(1, "", f"{source}: No such file or directory\n")
        if broken == MIDDLE:
            target.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        else:
            shutil.copyfile(path, target)
        return BROKEN if broken else Done(0, "", "")

    def guard_flags(self, of_slice: int) -> tuple[str, ...]:
        return self.guard

    def delete(self) -> None:
        self.events.append("delete")
        if self.alive:
            self._kill_all()
        self.alive = False

    # What happens to a slice without jaxft's doing.

    def preempt(self, raw: str = "PREEMPTED") -> None:
        """Every process of every worker is killed at once, and the state says LOST until the slice is deleted."""
        self.events.append("preempt")
        self._kill_all()
        self.states = [State(Phase.LOST, raw)]

    def kill(self, worker: Worker, number: int = signal.SIGKILL) -> None:
        """A signal to every process that was started on a worker."""
        for pid in self.processes(worker):
            try:
                os.kill(pid, number)
            except ProcessLookupError:  # it has just ended
                continue

    # What tests look at.

    def home(self, worker: Worker) -> Path:
        """The home folder of a worker, of the newest creation."""
        return self.folder / f"{self.incarnation}" / f"worker-{worker.number}"

    def environment(self, worker: Worker) -> dict[str, str]:
        """The environment of every command on a worker, whose Python is the one of the test."""
        home = self.home(worker)
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "JAX_PLATFORMS") if name in os.environ}
        devices = {"JAXFT_DEV": str(home / "dev"), "JAXFT_LIBTPU_LOCKFILE": str(home / "libtpu_lockfile")}
        given = kept | {"HOME": str(home), "JAXFT_PYTHON_ENV": sys.prefix} | devices | self.env
        return {name: value for name, value in given.items() if value is not None}

    def processes(self, worker: Worker) -> list[int]:
        """The processes on a worker: those whose HOME is its folder. Those that have ended are not among them."""
        mark, pids = f"HOME={self.home(worker)}".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    pids.append(int(folder.name))
            except OSError:  # it has ended in the meantime
                continue
        return pids

    def _kill_all(self) -> None:
        # A process may have started another while they were listed.
        while any([self.processes(worker) for worker in self._all()]):
            for worker in self._all():
                self.kill(worker)

    def _all(self) -> tuple[Worker, ...]:
        pairs = [(number, host) for number, hosts in enumerate(self.hosts) for host in range(hosts)]
        return tuple(
            Worker(number, of_slice, host, f"stub-{of_slice}", "127.0.0.1")
            for number, (of_slice, host) in enumerate(pairs)
        )

    @staticmethod
    def _short(argv: Sequence[str]) -> str:
        """An argv without the folders of the scripts, and without `bash`."""
        return " ".join(Path(word).name if word.endswith(".sh") else word for word in argv if word != "bash")
