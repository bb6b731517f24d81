"""`jaxft pod fetch`: a run brought to this machine, and examined."""

import shutil
from pathlib import Path
from typing import Any

from jaxft.errors import ConfigError, PodError
from jaxft.files.atomic import make_folder, unfinished_folder
from jaxft.home import local_path
from jaxft.pods import command
from jaxft.pods.attempts.front import Outside
from jaxft.pods.attempts.lead import summary_of, verify_run
from jaxft.pods.attempts.outputs import RUN, Bucket, HostDisk, Mounted
from jaxft.pods.command import Run
from jaxft.pods.commands.record import Say, front_of, machines_of, outside_of


def fetch(
    name: str, *, project: str | None = None, to: str | None = None, say: Say, run: Run = command.run,
    outside: Outside | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Brings a run to this machine and examines it as `jaxft verify` does. Raises PodError if it is not whole.

    to: the folder for a run that is in a bucket. A run that goes to a folder is brought there.
    """
    front = front_of(name, project, outside or outside_of(say, run))
    output = front.output
    if isinstance(output, Bucket):
        if to is None:
            raise ConfigError(
                f"run {name} is in {front.request.to}: give the folder that it is brought to, --to=FOLDER"
            )
        target = _from_bucket(output, Path(local_path(to)).absolute())
    else:
        if isinstance(output, HostDisk):
            if front.launch.node is not None:
                _, hosts = machines_of(front)
                if hosts is None:
                    raise PodError(
                        f"the machine of run {name} cannot be reached now: give the same command again later"
                    )
                output.bring(hosts)
        target = output.at_home if isinstance(output, HostDisk) else Mounted(Path(front.request.to))
        if not Path(target.output_dir).is_dir():
            raise PodError(f"nothing of run {name} is in {target.output_dir} yet: `jaxft pod status {name}` shows why")
    verify_run(target)
    say(f"run {name} is whole in {target.output_dir}")
    return summary_of(front) | {"folder": target.output_dir}


def _from_bucket(output: Bucket, folder: Path) -> Mounted:
    """Copies a run from its bucket below a folder of this machine."""
    target = Mounted(folder)
    if (folder / RUN).exists():
        raise ConfigError(f"{folder / RUN} is there already: give another --to, or move it away")
    unfinished = unfinished_folder(folder / RUN)
    shutil.rmtree(unfinished, ignore_errors=True)
    make_folder(unfinished.parent)
    output.copy_to(unfinished)
    unfinished.rename(folder / RUN)
    return target
