"""The whole examination: each part with what to do about it."""

from pathlib import Path

from jaxft.doctor import cluster, devices, machine, storage, versions
from jaxft.doctor.part import Part
from jaxft.errors import listed


def examine(output_dir: str | None = None, *, seconds: float = devices.SECONDS, look: bool = True) -> list[Part]:
    """Examines this machine, and `output_dir` if one is given.

    seconds: how long another process may look at the devices through JAX. look: whether it does. It does not while
    another process holds TPU chips, since libtpu would fail or wait.
    """
    tpu, users = machine.examine_tpu()
    gpu = machine.examine_gpu()
    told, hosts = cluster.examine()
    chips = tpu.value["chips"]
    if not look:
        seen = devices.not_examined("--no_devices")
    elif users:
        seen = devices.not_examined(f"process {listed([one.pid for one in users])} holds the chips")
    else:
        gpus = len(gpu.value["gpus"]) if gpu else 0
        seen = devices.examine(seconds, hosts=hosts, chips=chips, gpus=gpus)
    hardware = [tpu, *([gpu] if gpu else []), seen]
    disk = storage.examine_output(output_dir) if output_dir else [storage.examine_disk(Path.cwd())]
    return [
        *versions.examine(), versions.libtpu(chips), *hardware, *told, machine.examine_memory(), *disk,
        storage.examine_token(),
    ]  # fmt: skip
