"""What a written file is to say: the options of `jaxft pod manifest`, checked before anything is written."""

import re
from dataclasses import dataclass

from jaxft.config import RunConfig
from jaxft.errors import ConfigError
from jaxft.pods.machines import SlicesRequest, accelerator_type, chips_of_host, machine_of
from jaxft.pods.money import Rate, rate_of
from jaxft.pods.request import KEY, NAME, ZONE, check_bucket, check_saves, name_of

KINDS = ("jobset", "kueue", "skypilot")
KUBERNETES_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
IMAGE = re.compile(r"[\w.-]+(:\d+)?(/[\w.-]+)*(:[\w.-]+)?(@sha256:[0-9a-f]{64})?")
HUB_TOKEN = "HF_TOKEN"


@dataclass(frozen=True, kw_only=True)
class ManifestRequest(SlicesRequest):
    """The options of one file.

    kind: one of KINDS. name: of the run and of what is made for it. to: where the run goes, gs://BUCKET/RUN. image: of
    the container, for Kubernetes. spot, reservation: how the machines are bought. max_hours: of one attempt; with
    Kueue of all together. retries: attempts after the first. env: names of environment variables that the hosts get,
    of the Secret `secret` in Kubernetes. namespace, service_account: of Kubernetes. queue: the LocalQueue of Kueue.
    zone: for SkyPilot, None for any. prices: a file in place of jaxft's table.
    """

    kind: str
    name: str
    to: str
    image: str | None = None
    spot: bool = False
    reservation: str | None = None
    max_hours: float = 24.0
    retries: int = 3
    env: tuple[str, ...] = ()
    secret: str = "jaxft-env"
    namespace: str = "default"
    service_account: str | None = None
    queue: str = "jaxft"
    zone: str | None = None
    prices: str | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for what the other program would refuse, or what contradicts itself."""
        if self.kind not in KINDS:
            raise ConfigError(f"--kind={self.kind}: write one of {', '.join(KINDS)}")
        _check_names(self)
        _check_numbers(self)
        chips_of_host(self.shape)
        _check_image(self)
        if self.kind == "skypilot":
            _check_skypilot(self)

    @property
    def is_bounded(self) -> bool:
        """Whether the other program bounds the hours of all attempts together, and not of each."""
        return self.kind == "kueue"

    @property
    def rate(self) -> Rate:
        """The price of all chips. Raises ConfigError if the table has none, or none of spot machines."""
        return rate_of(self)

    @property
    def worst_case(self) -> str:
        """The longest time that the chips can work and what it costs, in words."""
        attempts = 1 if self.is_bounded else self.retries + 1
        words = "" if attempts == 1 else f", in {attempts} attempts of {self.max_hours:g} h each"
        return f"{self.rate.at_most(self.max_hours * attempts)}{words}"

    def check_config(self, config: RunConfig) -> None:
        """Raises ConfigError for a config that would lose its work on these machines."""
        check_saves(config, "spot" if self.spot else "on-demand")


def _check_names(request: ManifestRequest) -> None:
    if not NAME.fullmatch(request.name):
        raise ConfigError(
            f"--name={request.name}: up to 40 small letters, digits and dashes are taken here, the first a letter and "
            f"the last no dash. Write --name={name_of(request.name)}"
        )
    for option in ("namespace", "service_account", "queue", "secret"):
        value = getattr(request, option)
        if value is not None and not KUBERNETES_NAME.fullmatch(value):
            raise ConfigError(
                f"--{option}={value}: names in Kubernetes have up to 63 small letters, digits and dashes, and no dash "
                "at an end. Correct it"
            )
    for key in request.env:
        if not KEY.fullmatch(key):
            raise ConfigError(
                f"--env={key} is not the name of an environment variable. Give the name alone, such as --env=HF_TOKEN: "
                "its value never stands in the file"
            )
    bucket, _, folder = request.to.removeprefix("gs://").partition("/")
    if not request.to.startswith("gs://") or not bucket or not folder.strip("/"):
        raise ConfigError(
            f"--to={request.to}: the disks of these machines end with them, and an attempt goes on from what the one "
            "before has saved. Give a folder inside a bucket: --to=gs://BUCKET/RUN"
        )
    check_bucket(request.to)


def _check_numbers(request: ManifestRequest) -> None:
    if not 0 < request.max_hours < float("inf"):
        raise ConfigError(f"--max_hours={request.max_hours:g} must be above zero and finite: set it to 24, for example")
    if request.retries < 0:
        raise ConfigError(f"--retries={request.retries} must be zero or more: 0 means a single attempt")


def _check_image(request: ManifestRequest) -> None:
    if request.kind == "skypilot":
        return
    if request.image is None:
        raise ConfigError(
            f"--kind={request.kind} needs --image, a container with jaxft: build it from tpu_scripts/Dockerfile, "
            "push it to a registry, and name it, such as --image=us-docker.pkg.dev/PROJECT/REPOSITORY/jaxft:1"
        )
    if not IMAGE.fullmatch(request.image):
        raise ConfigError(f"--image={request.image} is no name of a container image: write REGISTRY/PATH:TAG")


def _check_skypilot(request: ManifestRequest) -> None:
    topology = request.shape
    if request.slices > 1:
        raise ConfigError(
            f"--slices={request.slices}: SkyPilot does not join slices. Use one larger slice, --kind=jobset, or "
            "`jaxft pod run`"
        )
    if machine_of(topology).runtime is None:
        raise ConfigError(
            f"topology {topology.name}: SkyPilot creates TPUs through the Cloud TPU API, which has no "
            f"{topology.chip.name}. Use --kind=jobset, or `jaxft pod run`"
        )
    if request.zone is not None and not ZONE.fullmatch(request.zone):
        raise ConfigError(f"--zone={request.zone} is no name of a zone: write it like us-east5-b")
    if request.reservation is not None:
        raise ConfigError(
            "--reservation: SkyPilot takes reservations from its own settings (gcp: specific_reservations)"
        )
    accelerator_type(topology)
