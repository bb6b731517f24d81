"""The settings of a server, from the command line."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from jaxft.config.reading.overrides import default_values, parse_assignment, set_value
from jaxft.errors import ConfigError
from jaxft.home import local_path
from jaxft.serving.jobs.run_config import BY_HYPERPARAMETER

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
WhileTraining = Literal["auto", "answer", "wait"]
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """models: folder or GGUF file of each base, by the name that clients know. state: the state folder.

    hosts: further names under which clients reach the server. context: tokens of a training sequence if a job does not
    say, and of a prompt with its answer. max_upload: bytes of a file. slots: answers of a base at a time. queue: those
    that may wait. adapters, max_rank: adapters that answer on a base at a time, and their largest rank. while_training:
    whether answers go on (`answer`) or not (`wait`) while a job trains; `auto` waits where there is an accelerator.
    price_per_hour: of this machine, in any currency. overrides: `section.field=value` settings of every job, below
    those of the job itself.
    """

    models: Mapping[str, str]
    state: Path
    host: str = "127.0.0.1"
    port: int = 8000
    hosts: Sequence[str] = ()
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_proxy: bool = False
    context: int = 2048
    max_upload: int = 8 * 2**30
    slots: int = 8
    queue: int = 64
    adapters: int = 8
    max_rank: int = 64
    while_training: WhileTraining = "auto"
    price_per_hour: float | None = None
    overrides: Sequence[str] = field(default=())

    def check(self) -> None:
        """Raises ConfigError for settings that cannot be used, or not safely."""
        if not self.models:
            raise ConfigError("jaxft serve needs a model to train: --model=NAME=PATH, once for each")
        if self.host not in LOOPBACK and not self.tls_proxy and self.tls_cert is None:
            raise ConfigError(
                f"--host={self.host} would send keys and rows over the network in the clear. Give --tls_cert=FILE and "
                "--tls_key=FILE, or --tls_proxy if a proxy speaks TLS for it."
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("--tls_cert and --tls_key belong to each other: give both")
        for option, path in (("tls_cert", self.tls_cert), ("tls_key", self.tls_key)):
            if path is not None and not os.path.isfile(path):
                raise ConfigError(f"--{option}={path} is no file")
        if self.context < 1 or self.max_upload < 1 or not 0 <= self.port <= 65535:
            raise ConfigError("--context and --max_upload must be above 0, and --port from 0 to 65535")
        self._check_answers()
        if self.price_per_hour is not None and not (math.isfinite(self.price_per_hour) and self.price_per_hour > 0):
            raise ConfigError(f"--price_per_hour={self.price_per_hour} must be above 0")
        for override in self.overrides:
            key, value = parse_assignment(override)
            if key in BY_HYPERPARAMETER or key == "output_dir":
                raise ConfigError(f"{override}: the server and its clients set {key}")
            set_value(default_values(), key, value)

    def _check_answers(self) -> None:
        if self.slots < 1 or self.queue < 0 or self.adapters < 0 or self.max_rank < 1:
            raise ConfigError("--slots and --max_rank must be above 0, --queue and --adapters at least 0")
        if self.while_training not in get_args(WhileTraining):
            raise ConfigError(f"--while_training={self.while_training} must be one of {get_args(WhileTraining)}")

    def host_names(self, port: int) -> frozenset[str]:
        """The Host headers that are answered."""
        names = [*LOOPBACK, self.host] if self.host in LOOPBACK else [self.host]
        plain = [f"[{name}]" if ":" in name else name for name in names]
        own = [*plain, *(f"{name}:{port}" for name in plain)]
        further = [*self.hosts, *(f"{name}:{port}" for name in self.hosts if ":" not in name)]
        return frozenset(name.lower() for name in (*own, *further))


def parse_models(given: Sequence[str]) -> dict[str, str]:
    """The bases by name, from `NAME=PATH` texts. Raises ConfigError for a text of another form, or a missing path."""
    models: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise ConfigError(f"--model={text} must be NAME=PATH, such as --model=small=/models/SmolLM2-135M")
        if NAME.fullmatch(name) is None or name.startswith("ft:") or ".." in name:
            raise ConfigError(f"{name!r} cannot be the name of a model: use letters, digits and . _ - / alone")
        if name in models:
            raise ConfigError(f"two models have the name {name!r}: give each its own")
        path = local_path(path)
        if "://" not in path and not os.path.exists(path):
            raise ConfigError(f"--model={text}: there is no {path}")
        if os.path.isfile(os.path.join(path, "adapter_config.json")):
            raise ConfigError(f"--model={text} is an adapter: give its base, or merge it first (`jaxft export`)")
        models[name] = path if "://" in path else os.path.abspath(path)
    return models
