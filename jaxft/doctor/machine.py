"""The accelerators that this machine has, whether JAX can use them or not, who holds them, and its memory."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jax._src import hardware_utils  # the chips that the PCI bus lists have no public name

from jaxft.doctor.part import Part
from jaxft.errors import counted, listed

ROOT = Path("/")
LOCK_FILE = "tmp/libtpu_lockfile"
DEVICE_FILES = re.compile(r"accel\d+|vfio/\d+")
SMI_SECONDS = 30
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A process that has opened the file of an accelerator. Its arguments may hold secrets, so they are not read."""

    pid: int
    program: str
    file: str


def chip_files(root: Path = ROOT) -> list[str]:
    """The files of TPU chips, such as /dev/accel0 or /dev/vfio/0."""
    names = [f"accel{path.name[5:]}" for path in root.glob("dev/accel*")]
    names += [f"vfio/{path.name}" for path in root.glob("dev/vfio/*")]
    return sorted(f"/dev/{name}" for name in names if DEVICE_FILES.fullmatch(name))


def holders(files: Sequence[str], root: Path = ROOT) -> tuple[list[Holder], int]:
    """(the processes that have opened one of these files, the number of processes whose files could not be listed)."""
    wanted, users, hidden = set(files), [], 0
    for process in sorted(root.glob("proc/[0-9]*"), key=lambda path: int(path.name)):
        try:
            descriptors = list((process / "fd").iterdir())
        except PermissionError:
            hidden += 1
            continue
        except OSError:  # it has ended
            continue
        for file in sorted(wanted & set(map(_opened, descriptors)))[:1]:
            users.append(Holder(pid=int(process.name), program=_program(process), file=file))
    return users, hidden


def _opened(descriptor: Path) -> str:
    """The file that a process has opened; an empty string if it has closed it meanwhile."""
    try:
        return os.readlink(descriptor)
    except OSError:
        return ""


def examine_tpu(root: Path = ROOT) -> tuple[Part, list[Holder]]:
    """The TPU chips of this machine, and the processes that hold them."""
    files = chip_files(root)
    chips, _ = hardware_utils.num_available_tpu_chips_and_device_id()
    users, hidden = holders(files, root) if files else ([], 0)
    value = {"chips": chips, "files": files, "held_by": [asdict(one) for one in users]}
    if not chips:
        return Part(name="tpu", text="no TPU chip", value=value), []
    text = f"{counted(chips, 'chip')}, {listed(files) or 'no file of them in /dev'}"
    mend = None
    if users:
        who = listed([f"{one.pid} ({one.program})" for one in users])
        text += f"; held by process {who}"
        pids = " ".join(str(one.pid) for one in users)
        mend = f"A chip serves one process. Wait for its run, or end it: kill {pids}."
    elif not files:
        mend = "In a container, run it with --privileged, or let Kubernetes give it google.com/tpu."
    elif (lock := _lock_of_another(root)) is not None:
        text += f"; {lock} belongs to another user, and no process that can be seen here holds a chip"
        mend = f"If no run of that user is left, remove it: sudo rm {lock}."
    elif hidden:
        text += f"; the files of {counted(hidden, 'process')} of other users could not be seen without root"
    return Part(name="tpu", text=text, value=value, mend=mend), users


def examine_gpu() -> Part | None:
    """The NVIDIA GPUs of this machine as its driver lists them; None without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    gpus = _nvidia_smi("--query-gpu=name,memory.total,memory.used")
    if isinstance(gpus, str):
        mend = "The driver does not answer: see what nvidia-smi says, and restart the machine or install the driver."
        return Part(name="gpu", text=f"nvidia-smi fails: {gpus}", value={"gpus": []}, mend=mend)
    apps = _nvidia_smi("--query-compute-apps=pid,process_name")
    users = [] if isinstance(apps, str) else [int(pid) for pid, *_ in apps if pid.isdecimal()]
    text = listed([f"{name} ({used} of {total} in use)" for name, total, used in gpus]) or "no GPU"
    if users:
        text += f"; used by process {listed(users)}"
    return Part(name="gpu", text=text, value={"gpus": [name for name, *_ in gpus], "held_by": users})


def examine_memory(root: Path = ROOT) -> Part:
    """The memory of this machine, or of the container in which this process runs."""
    lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    table = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    total, free = table["MemTotal"], table.get("MemAvailable", table["MemFree"])
    value = {"total_bytes": total, "free_bytes": free, "limit_bytes": None}
    text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    limit = root / "sys/fs/cgroup/memory.max"
    if limit.is_file() and (words := limit.read_text(encoding="ascii").strip()).isdecimal() and int(words) < total:
        value["limit_bytes"] = int(words)
        text += f"; this container may use {int(words) / GIB:.1f} GiB"
    return Part(name="memory", text=text, value=value)


def _program(process: Path) -> str:
    try:
        return (process / "comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "ended"


def _lock_of_another(root: Path) -> str | None:
    lock = root / LOCK_FILE
    try:
        other = lock.stat().st_uid != os.getuid()
    except OSError:
        return None
    return f"/{LOCK_FILE}" if other and not os.access(lock, os.W_OK) else None


def _nvidia_smi(query: str) -> list[list[str]] | str:
    """The rows of a query, or why there are none."""
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            capture_output=True, text=True, timeout=SMI_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode:
        return (done.stdout + done.stderr).strip()[:300] or f"it ended with {done.returncode}"
    return [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
