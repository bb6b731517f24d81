"""`jaxft pod run`: a run on TPUs of Google Cloud, from its plan to the deletion of its machines."""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxft.config import RunConfig
from jaxft.errors import ConfigError, FolderInUseError, PodError
from jaxft.files.locks.lock import lock
from jaxft.pods import command
from jaxft.pods.attempts.front import Front, Outside
from jaxft.pods.attempts.launch import NAME, Launch, Records, folder_of
from jaxft.pods.attempts.lead import lead
from jaxft.pods.attempts.outputs import Output, keep_copy, output_of
from jaxft.pods.attempts.rehearsal import RehearsedSlices, rehearsed_output
from jaxft.pods.command import Run
from jaxft.pods.money import check_limit
from jaxft.pods.pack import pack
from jaxft.pods.plan import check
from jaxft.pods.providers import slices_of
from jaxft.pods.request import Request

# What may be another in a command that takes a run up: always, and only while no machines of the run exist.
FREE = {
    "max_hours",
    "max_usd",
    "retries",
    "stall_minutes",
    "keep_minutes",
    "detach",
    "dry_run",
    "prices",
    "skip_plan",
    "env",
}
FREE_WITHOUT_NODE = {
    "zones", "spot", "flex_start", "reservation", "queue_hours", "internal_ip", "iap", "network", "subnetwork",
    "service_account", "disk_gb", "api",
}  # fmt: skip


def run(
    request: Request, config: RunConfig, *, say: Callable[[str], None], run: Run = command.run,
    outside: Outside | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Leads a run to its end, or takes it up where an earlier command left it.

    say: shows one line. outside: what tests replace; None for the real cloud. Returns the run's figures. Raises
    ConfigError for options that cannot be carried out, before anything is created, FolderInUseError if another process
    leads the run, and PodError if it did not come to its end.
    """
    request.check_config(config)
    rate = check_limit(request)
    secrets = secrets_of(request)
    outside = outside or Outside(say=say, slices_of=slices_of, run=run, ask=_terminal())
    if request.dry_run:
        check(request, config, say)
        return _rehearse(request, config, outside, rate.hour_usd, secrets)
    folder = folder_of(request.name)
    with led(request.name):
        output = output_of(request)
        output.check()
        records = Records(folder, keep_copy(output, NAME))
        packed = pack(config, folder, secrets=secrets)
        if records.read() is None and output.read(NAME) is None:
            check(request, config, say)
        else:
            say(f"{rate.at_most(request.max_hours)}, by prices of {rate.date}")
        launch = _opened(records, output, request, config, packed.path.name, rate.hour_usd, outside)
        records.set_wish(None)
        archive = folder / launch.archive
        if not archive.is_file():
            raise PodError(
                f"{archive} is gone, which run {request.name} began with, and what is packed now is another. Start a "
                f"new run with another --name and --to, or, to begin this one anew: `jaxft pod delete {request.name}`"
            )
        front = Front(
            request=request, launch=launch, records=records, output=output, archive=archive, outside=outside,
            secrets=secrets,
        )  # fmt: skip
        return lead(front)


@contextlib.contextmanager
def led(name: str) -> Iterator[None]:
    """Keeps other processes of this machine from leading the run. Raises FolderInUseError, which names the other."""
    folder = folder_of(name)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with lock(folder, "jaxft pod run", inside=True):
            yield
    except FolderInUseError as error:
        raise FolderInUseError(
            f"run {name} is led by another process already. `jaxft pod logs {name} --follow` shows what it does, "
            f"`jaxft pod stop {name}` ends it. ({error})"
        ) from error


def secrets_of(request: Request) -> dict[str, str]:
    """The values of --env in this environment. Raises ConfigError for one that is not set."""
    values = {}
    for key in request.env:
        if key not in os.environ:
            raise ConfigError(
                f"--env={key}: {key} is not set in this environment, so that there is nothing to give to the hosts. "
                f"Set it first (`export {key}=...`), or leave out the option"
            )
        values[key] = os.environ[key]
    return values


def _terminal() -> Callable[[str], str] | None:
    """What asks a question, if somebody can answer."""
    return input if sys.stdin is not None and sys.stdin.isatty() else None


def _opened(
    records: Records,
    output: Output,
    request: Request,
    config: RunConfig,
    archive: str,
    hour_usd: float,
    outside: Outside,
) -> Launch:
    """The launch of this run: a new one, or the one that is there, if it is the same run."""
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True, default=str).encode()).hexdigest()
    launch = records.read()
    if launch is None and (copy := output.read(NAME)) is not None:
        launch = Launch.from_text(copy.decode("utf-8", "replace"), f"{request.to}/{NAME}")
        outside.say(f"takes up run {launch.name} from {request.to}/{NAME}")
    if launch is None or (launch.state == "deleted" and output.newest() is None):
        launch = Launch(
            name=request.name, request=request.to_json(), archive=archive, config=digest, hour_usd=hour_usd,
            created=outside.now(),
        )  # fmt: skip
        output.write(NAME, launch.to_text().encode())  # a place that takes nothing is told before anything is created
        records.save(launch)
        return launch
    _check_same(launch, request, digest)
    if launch.archive != archive and (records.folder / launch.archive).is_file():
        outside.say(
            f"goes on with {launch.archive}, which the run began with; jaxft or the data have changed here since"
        )
    if launch.state not in ("open", "done"):
        launch.reopen()
    launch.request, launch.hour_usd = request.to_json(), hour_usd
    records.save(launch)
    return launch


def _check_same(launch: Launch, request: Request, digest: str) -> None:
    free = FREE | (set() if launch.node is not None else FREE_WITHOUT_NODE)
    before, now = launch.request, request.to_json()
    changed = sorted(key for key in now if key not in free and before.get(key) != now[key])
    other = f"give another --name and --to for a new run, or `jaxft pod delete {launch.name}` first"
    if changed:
        words = ", ".join(f"{key} was {before.get(key)} and is {now[key]}" for key in changed)
        raise ConfigError(f"run {launch.name} was begun otherwise: {words}. Give it as before, or {other}")
    if launch.config != digest:
        raise ConfigError(
            f"run {launch.name} was begun with another config, and goes on with the same bits only under its own. Give "
            f"the config as before, or {other}"
        )


def _rehearse(
    request: Request, config: RunConfig, outside: Outside, hour_usd: float, secrets: dict[str, str]
) -> dict[str, Any]:
    """The same steps on paper: nothing is created, and nothing but the archive is kept."""

    def slices(*arguments: Any, **options: Any) -> Any:
        return RehearsedSlices(outside.slices_of(*arguments, **options))

    with tempfile.TemporaryDirectory() as scratch:
        # The archive stays, so that the printed commands can be pasted.
        folder, kept = Path(scratch), folder_of(request.name)
        kept.mkdir(parents=True, exist_ok=True)
        packed = pack(config, kept, secrets=secrets)
        launch = Launch(
            name=request.name, request=request.to_json(), archive=packed.path.name, config="", hour_usd=hour_usd,
            created=outside.now(),
        )  # fmt: skip
        paper = Outside(
            say=outside.say, slices_of=slices, run=outside.run, now=outside.now, sleep=lambda seconds: None,
            platform=outside.platform, port=outside.port,
        )  # fmt: skip
        front = Front(
            request=request, launch=launch, records=Records(folder), output=rehearsed_output(request, folder / "to"),
            archive=packed.path, outside=paper, secrets=secrets,
        )  # fmt: skip
        return lead(front)
