"""What `jaxft pod run` is requested to do: its options, checked before anything is packed, created or paid for."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.config import RunConfig
from jaxft.errors import ConfigError
from jaxft.files.buckets.store import Bucket
from jaxft.pods.machines import SlicesRequest, chips_of_host, machine_of

NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
ZONE = re.compile(r"[a-z]+-[a-z]+\d+-[a-z]")
PROJECT = re.compile(r"([a-z][-a-z0-9.]*:)?[a-z][-a-z0-9]{4,28}[a-z0-9]")
KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
LABEL = "jaxft-run"  # of everything that is created; its value is the name of the run
TUPLES = ("zones", "overrides", "env")  # fields that are lists in JSON
APIS = ("auto", "compute", "tpu")
FLEX_START_HOURS = 168.0  # the longest life of a flex-start machine, by Google's rule


@dataclass(frozen=True, kw_only=True)
class Request(SlicesRequest):
    """The options of one run on Google Cloud. Every value is plain, so that it can be kept as JSON.

    name: of the run, and of all that is made for it. zones: where to try, in this order. to: where the run goes,
    gs:// or a folder of this machine. config, overrides: of the training, as its command line takes them. project:
    None for gcloud's own. spot, flex_start, reservation: how the machines are bought; on demand if none is set.
    api: compute or tpu, or auto for the one to prefer. max_hours: of all attempts together, in which machines
    exist. max_usd: refuse what could cost more. queue_hours: how long the request may wait for machines. retries:
    attempts after the first. stall_minutes: without a log line, after which a run counts as hung. keep_minutes: in
    which machines stay after an error. env: names of environment variables that the hosts get. shared: whether `to`
    is a folder that every host and this machine mount under the same path. internal_ip, iap: how hosts are reached.
    network, subnetwork, service_account: of the machines, None for the project's defaults. disk_gb: of a boot disk
    of Compute Engine. prices: a file in place of jaxft's table. skip_plan: do not compile the step first. detach:
    leave once training has started. dry_run: print the commands alone.
    """

    name: str
    zones: tuple[str, ...]
    to: str
    config: str | None = None
    overrides: tuple[str, ...] = ()
    project: str | None = None
    spot: bool = False
    flex_start: bool = False
    reservation: str | None = None
    api: str = "auto"
    max_hours: float = 24.0
    max_usd: float | None = None
    queue_hours: float | None = None
    retries: int = 20
    stall_minutes: float = 30.0
    keep_minutes: float = 15.0
    env: tuple[str, ...] = ()
    shared: bool = False
    internal_ip: bool = False
    iap: bool = False
    network: str | None = None
    subnetwork: str | None = None
    service_account: str | None = None
    disk_gb: int = 200
    prices: str | None = None
    skip_plan: bool = False
    detach: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError for what Google Cloud would refuse, or what contradicts itself."""
        _check_names(self)
        _check_numbers(self)
        _check_ways(self)
        chips_of_host(self.shape)
        self.provider  # noqa: B018 - refuses an API that does not have the kind
        _check_folder(self)

    @property
    def chips(self) -> int:
        """The number of chips of all slices."""
        return self.shape.chips

    @property
    def provider(self) -> str:
        """`compute` or `tpu`: the API that creates the machines. Raises ConfigError if it does not have the kind."""
        kind, apis = self.shape.chip.name, machine_of(self.shape).apis
        if self.api == "auto":
            return apis[0]
        if self.api not in apis:
            other = "Compute Engine" if apis[0] == "compute" else "the Cloud TPU API"
            raise ConfigError(f"--api={self.api}: only {other} has {kind}. Leave --api out, or set --api={apis[0]}")
        return self.api

    @property
    def model(self) -> str:
        """How the machines are bought: spot, flex-start, reservation or on-demand."""
        if self.spot:
            return "spot"
        return "flex-start" if self.flex_start else "reservation" if self.reservation else "on-demand"

    @property
    def is_remote(self) -> bool:
        """Whether the run goes to a bucket."""
        return self.to.startswith("gs://")

    @property
    def queued(self) -> bool:
        """Whether the Cloud TPU API gets a queued resource, and not a node."""
        return self.slices > 1 or self.flex_start or self.queue_hours is not None or self.reservation is not None

    def to_json(self) -> dict[str, Any]:
        """Plain values, from which `from_json` makes an equal request."""
        return dataclasses.asdict(self) | {name: list(getattr(self, name)) for name in TUPLES}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Request":
        """The request of which `to_json` made the values. Raises ConfigError as a new request does."""
        return cls(**{**values, **{name: tuple(values[name]) for name in TUPLES}})

    def check_config(self, config: RunConfig) -> None:
        """Raises ConfigError for a config that would lose its work on these machines, or names another bucket."""
        check_saves(config, self.model)
        if "://" in config.output_dir and config.output_dir.rstrip("/") != f"{self.to.rstrip('/')}/run":
            raise ConfigError(
                f"output_dir={config.output_dir}: the run folder is {self.to.rstrip('/')}/run, as --to says. Leave out "
                "output_dir, or give its bucket and folder as --to"
            )


def check_saves(config: RunConfig, model: str) -> None:
    """Raises ConfigError for a run without checkpoints on machines that are taken away. model: as `Request.model`."""
    if model in ("spot", "flex-start") and not (config.checkpoint.every or config.checkpoint.every_epochs):
        what = "may take spot machines away" if model == "spot" else "deletes flex-start machines at their time limit"
        raise ConfigError(
            f"Google Cloud {what}, and without checkpoint.every all steps since the start would be lost. "
            "Set it, such as --config.checkpoint.every=100, or leave out "
            f"--{'spot' if model == 'spot' else 'flex_start'}"
        )


def check_bucket(to: str) -> None:
    """Raises ConfigError for an address that no bucket has. No bucket is asked."""
    try:
        Bucket(to)
    except ConfigError as error:
        raise ConfigError(f"--to: {error}") from error


def name_of(output_dir: str) -> str:
    """The name of a run whose folder is `output_dir`, by Google's rule for names."""
    leaf = re.sub(r"[^a-z0-9]+", "-", output_dir.rstrip("/").rpartition("/")[2].lower()).strip("-")
    return (leaf if leaf[:1].isalpha() else f"run-{leaf}")[:40].rstrip("-")


def _check_names(request: Request) -> None:
    if not NAME.fullmatch(request.name):
        raise ConfigError(
            f"--name={request.name}: Google Cloud takes up to 40 small letters, digits and dashes here, the first a "
            f"letter and the last no dash. Write --name={name_of(request.name)}"
        )
    if not request.zones:
        raise ConfigError("--zone is missing: name one or more, such as --zone=us-east5-b,us-east1-d")
    for zone in request.zones:
        if not ZONE.fullmatch(zone):
            raise ConfigError(
                f"--zone={zone} is no name of a zone: write it like us-east5-b, with the letter at its end"
            )
    if len(set(request.zones)) < len(request.zones):
        raise ConfigError(f"--zone={','.join(request.zones)} names a zone twice: name each once")
    if request.project is not None and not PROJECT.fullmatch(request.project):
        raise ConfigError(f"--project={request.project} is no id of a project: `gcloud projects list` shows yours")
    bucket, _, folder = request.to.removeprefix("gs://").partition("/")
    if not request.to or (request.is_remote and not (bucket and folder.strip("/"))):
        raise ConfigError(
            f"--to={request.to}: give a folder inside a bucket, such as --to=gs://BUCKET/RUN, or one of this machine"
        )
    if request.is_remote:
        check_bucket(request.to)
    if "://" in request.to and not request.is_remote:
        raise ConfigError(f"--to={request.to}: hosts of Google Cloud write to gs://BUCKET/RUN, or give a folder")
    for key in request.env:
        if not KEY.fullmatch(key):
            raise ConfigError(
                f"--env={key} is not the name of an environment variable. Give the name alone, such as --env=HF_TOKEN: "
                "its value is read here and never stands in a command"
            )


def _check_numbers(request: Request) -> None:
    for option in ("max_hours", "max_usd", "queue_hours", "stall_minutes"):
        value = getattr(request, option)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{option}={value:g} must be above zero and finite: set it higher, or leave it out")
    if not 0 <= request.keep_minutes < float("inf") or request.retries < 0:
        raise ConfigError("--keep_minutes and --retries must be zero or more: set them to 0 to keep or retry nothing")
    if request.disk_gb < 50:
        raise ConfigError(f"--disk_gb={request.disk_gb}: image, JAX and the run need 50 GB or more. Set it to 200")
    if request.flex_start and request.max_hours > FLEX_START_HOURS:
        raise ConfigError(
            f"--max_hours={request.max_hours:g}: flex-start machines live at most {FLEX_START_HOURS:g} hours. Lower it"
        )


def _check_folder(request: Request) -> None:
    """Refuses a folder of this machine where the run would be lost, or its hosts would not find each other's files."""
    if request.shared and (request.is_remote or not request.to.startswith("/")):
        raise ConfigError(
            f"--to={request.to}: --shared says that every host mounts this folder, so give its absolute path there, "
            "such as --to=/mnt/filestore/RUN, or leave out --shared"
        )
    if request.is_remote or request.shared:
        return
    if request.processes > 1:
        raise ConfigError(
            f"--to={request.to}: {request.shape.describe()} has {request.processes} hosts, which all "
            "write the run and share no folder of this machine. Give a bucket: --to=gs://BUCKET/RUN, and `jaxft pod "
            "fetch` brings the run here. Or say --shared if every host and this machine mount that folder."
        )
    if request.detach:
        raise ConfigError(
            f"--to={request.to}: with --detach nobody is here to bring the run from the disk of its machine, with "
            "which it would be deleted. Leave out --detach, or give a bucket: --to=gs://BUCKET/RUN."
        )


def _check_ways(request: Request) -> None:
    ways = {"--spot": request.spot, "--flex_start": request.flex_start, "--reservation": request.reservation}
    chosen = [name for name, value in ways.items() if value]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)} are different ways to buy machines: give one of them")
    if request.api not in APIS:
        raise ConfigError(f"--api={request.api} is not one of {', '.join(APIS)}")
    if request.internal_ip and request.iap:
        raise ConfigError("--internal_ip and --iap are different ways to reach a host: give one of them")
