"""A request to create a job, checked field by field."""

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ConfigError
from jaxft.serving.http.bodies import object_field, refuse_unknown, text_field, whole_field
from jaxft.serving.http.errors import bad_request
from jaxft.serving.jobs.hyperparameters import Hyperparameters, parse_hyperparameters
from jaxft.serving.jobs.run_config import check_config

FIELDS = (
    "model", "training_file", "validation_file", "suffix", "seed", "method", "hyperparameters", "metadata",
    "integrations", "jaxft",
)  # fmt: skip
OURS = ("config", "start")
SUFFIX = re.compile(r"[A-Za-z0-9._-]{1,64}")
METADATA, KEY_CHARACTERS, VALUE_CHARACTERS = 16, 64, 512
SEEDS = 2**31 - 1
LATER = ("dpo", "reinforcement")


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """What a client wants. start: whether to train once the rows are examined. config: settings of the run."""

    model: str
    training_file: str
    validation_file: str | None
    suffix: str
    seed: int
    hyperparameters: Hyperparameters
    metadata: Mapping[str, str]
    config: Mapping[str, Any]
    start: bool


def parse_job(values: Mapping[str, Any]) -> JobRequest:
    """The request in a body. Raises ApiError 400 for anything that is unknown, missing, or not served."""
    refuse_unknown(values, FIELDS)
    if values.get("integrations"):
        raise bad_request("integrations are not served yet.", "integrations")
    ours = object_field(values, "jaxft")
    refuse_unknown(ours, OURS, "jaxft.")
    start = True if ours.get("start") is None else ours["start"]
    if not isinstance(start, bool):
        raise bad_request("jaxft.start must be true or false.", "jaxft.start")
    seed = whole_field(values, "seed", 0, SEEDS)
    return JobRequest(
        model=text_field(values, "model", required=True) or "",
        training_file=text_field(values, "training_file", required=True) or "",
        validation_file=text_field(values, "validation_file"),
        suffix=_suffix(text_field(values, "suffix", most=1000)),
        seed=secrets.randbelow(SEEDS) if seed is None else seed,
        hyperparameters=_hyperparameters(values),
        metadata=_metadata(object_field(values, "metadata")),
        config=_config(object_field(ours, "config", "jaxft.")),
        start=start,
    )


def _suffix(suffix: str | None) -> str:
    if suffix and SUFFIX.fullmatch(suffix) is None:
        raise bad_request("suffix must be 1 to 64 of the characters A-Z, a-z, 0-9, dot, underscore and dash.", "suffix")
    return suffix or ""


def _hyperparameters(values: Mapping[str, Any]) -> Hyperparameters:
    """Those of the method, or the older ones beside it."""
    older = object_field(values, "hyperparameters")
    method = object_field(values, "method")
    refuse_unknown(method, ("type", "supervised", *LATER), "method.")
    kind = method.get("type", "supervised")
    if kind != "supervised" or any(method.get(name) for name in LATER):
        given = kind if kind != "supervised" else next(name for name in LATER if method.get(name))
        raise bad_request(f"The method {str(given)[:40]!r} is not served yet: only supervised is.", "method")
    section = object_field(method, "supervised", "method.")
    refuse_unknown(section, ("hyperparameters",), "method.supervised.")
    newer = object_field(section, "hyperparameters", "method.supervised.")
    if older and newer and older != newer:
        raise bad_request("hyperparameters and method.supervised.hyperparameters differ: give one.", "hyperparameters")
    if newer:
        return parse_hyperparameters(newer, "method.supervised.hyperparameters.")
    return parse_hyperparameters(older, "hyperparameters.")


def _metadata(values: Mapping[str, Any]) -> dict[str, str]:
    if len(values) > METADATA:
        raise bad_request(f"metadata may have {METADATA} pairs.", "metadata")
    for key, value in values.items():
        if not isinstance(value, str) or len(key) > KEY_CHARACTERS or len(value) > VALUE_CHARACTERS:
            raise bad_request(
                f"metadata must be texts of at most {VALUE_CHARACTERS} characters by keys of at most {KEY_CHARACTERS}.",
                "metadata",
            )
    return dict(values)


def _config(config: Mapping[str, Any]) -> dict[str, Any]:
    try:
        check_config(config)
    except ConfigError as error:
        raise bad_request(f"jaxft.config: {error}", "jaxft.config") from error
    return dict(config)
