"""What a run must find at its start: how many processes, and which kind of devices.

JAX falls back to the CPU where it cannot use an accelerator, and to a single process where it detects no others. A
slice whose hosts lack libtpu would so train once on each host's CPU, all into one folder.
"""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import jax
from jax._src import hardware_utils  # the chips that the PCI bus lists have no public name

from jaxft.errors import ConfigError, counted, listed
from jaxft.sharding.processes import exchange

Platform = Literal["tpu", "gpu", "cpu"]
PLATFORMS: tuple[str, ...] = get_args(Platform)
# By which GKE and people tell a process of a TPU slice where the others are; JAX reads them in this order.
WORKERS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
NUMBER, SLICES = "TPU_WORKER_ID", "MEGASCALE_NUM_SLICES"
DOCTOR = "`jaxft doctor` on each host shows what is there."
INSTALL = {"tpu": "pip install 'jaxft[tpu]'", "gpu": "pip install 'jaxft[cuda]'"}


@dataclass(frozen=True, kw_only=True)
class Expected:
    """processes: how many a run must have; platform: of their devices, one of PLATFORMS. None: any."""

    processes: int | None = None
    platform: str | None = None


def check_processes(expected: Expected, count: int) -> None:
    """Refuses a run of another number of processes. Raises ConfigError, in every process that was told this count."""
    if expected.platform is not None and expected.platform not in PLATFORMS:
        raise ConfigError(f"expect_platform={expected.platform!r}: write one of {', '.join(PLATFORMS)}")
    if expected.processes is None or count == expected.processes:
        return
    if expected.processes < 1:
        raise ConfigError(f"expect_processes={expected.processes}: a run has at least one process. Write 1 or more")
    if count == 1:
        reason = (
            "no other was named by --coordinator, --num_processes and --process_id, and JAX detected none. On a TPU "
            f"slice it detects the hosts only where libtpu is installed and finds chips. {DOCTOR.removesuffix('.')}"
        )
    else:
        reason = "--num_processes, or the cluster that JAX detected, says so. Start as many as are expected"
    raise ConfigError(
        f"{expected.processes:,} process{' is' if expected.processes == 1 else 'es are'} expected, and this run has "
        f"{count:,}: {reason}. Give --expect_processes the right number, if this one is wrong."
    )


def check_platform(expected: Expected, me: int, count: int) -> None:
    """Refuses devices of another platform, and processes whose platforms differ.

    Call it in each of the `count` processes, of which this one is `me`, once `jax.distributed` has started. All raise
    the same ConfigError. A single process of which nothing is expected uses no device here.
    """
    if count == 1 and expected.platform is None:
        return
    platforms = exchange("jaxft/platform", _platform(), me, count)
    wrong = {number: one for number, one in enumerate(platforms) if one != (expected.platform or platforms[0])}
    if not wrong:
        return
    kinds = sorted(set(wrong.values()))
    if expected.platform is None:
        shown = ", ".join(f"process {number} {one}" for number, one in enumerate(platforms[:8]))
        raise ConfigError(
            f"the processes of this run use different devices: {shown}. All must use the same. Where the accelerator "
            f"is missing, install what drives it ({INSTALL['tpu']} or {INSTALL['gpu']}). {DOCTOR}"
        )
    raise ConfigError(_message(expected.platform, kinds, sorted(wrong), len(platforms)))


def is_only_host() -> bool:
    """Whether the environment names one host and gives it no number, as on Kaggle: TPU_PROCESS_ADDRESSES=local.

    JAX would look for a host of this name, and for the number.
    """
    return len(_named_hosts()) == 1 and not os.environ.get(NUMBER) and os.environ.get(SLICES, "") in ("", "1")


def refuse_lonely_worker() -> None:
    """Refuses a single process where the environment names several workers of a slice, or where chips are unused.

    Raises ConfigError.
    """
    hosts = _named_hosts()
    names = [f"{name} names {len(hosts)} hosts" for name in WORKERS if os.environ.get(name)][:1] if hosts[1:] else []
    slices = os.environ.get(SLICES, "")
    if slices.isdecimal() and int(slices) > 1:
        names.append(f"{SLICES} is {slices}")
    if names:
        given = [name for name in (*WORKERS, SLICES) if os.environ.get(name)]
        raise ConfigError(
            f"{' and '.join(names)}, but JAX sees this process alone: {_why_alone()}. Each host would train by "
            f"itself, and all would write the same output_dir. Install libtpu on every host ({INSTALL['tpu']}); "
            f"{DOCTOR} To train on this host alone on purpose, unset {', '.join(given)}."
        )
    chips = _chips()
    if chips and not _has_libtpu() and "JAX_PLATFORMS" not in os.environ:
        raise ConfigError(
            f"this machine has {counted(chips, 'TPU chip')}, and libtpu is not installed, so JAX would train on the "
            f"CPU. Run {INSTALL['tpu']}, or set JAX_PLATFORMS=cpu to train on the CPU on purpose."
        )


def _named_hosts() -> list[str]:
    """The hosts of the slice that the environment names."""
    return next((os.environ[name].split(",") for name in WORKERS if os.environ.get(name)), [])


def _platform() -> str:
    """The platform of the devices that JAX uses in this process, or why there is none."""
    try:
        return jax.default_backend()
    except RuntimeError as error:  # JAX_PLATFORMS names one that cannot start
        return f"none ({str(error).splitlines()[0][:300]})"


def _message(expected: str, kinds: Sequence[str], wrong: Sequence[int], count: int) -> str:
    who = "" if count == 1 else f" in process{'es' if len(wrong) > 1 else ''} {listed(wrong)} of {count}"
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and expected not in platforms.replace("cuda", "gpu").split(","):
        mend = f"JAX_PLATFORMS={platforms} keeps JAX from it: unset it"
    elif expected == "cpu":
        mend = "Set JAX_PLATFORMS=cpu to train on the CPU"
    elif expected == "tpu" and not _has_libtpu():
        mend = f"libtpu is not installed: run {INSTALL['tpu']}"
    elif expected == "tpu" and not _chips():
        mend = "This machine shows no TPU chip: use a host of a slice, and in Kubernetes request google.com/tpu"
    else:
        mend = (
            f"Run {INSTALL[expected]}; a plugin of another version than jaxlib is not used, and neither are chips that "
            "another process holds"
        )
    return (
        f"the platform {expected} is expected, and JAX uses {listed(kinds)}{who}. {mend}. {DOCTOR} "
        "Give --expect_platform the right one, if this one is wrong."
    )


def _chips() -> int:
    """The number of TPU chips on this machine's PCI bus."""
    return hardware_utils.num_available_tpu_chips_and_device_id()[0]


def _has_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None or bool(os.environ.get("TPU_LIBRARY_PATH"))


def _why_alone() -> str:
    if not _has_libtpu():
        return "libtpu is not installed here"
    if not _chips():
        return "this machine has no TPU chip that libtpu could use"
    return "another cluster that JAX detects first says so"
