"""Slices of whichever API a request names."""

import time
from collections.abc import Callable

from jaxft.errors import PodError
from jaxft.pods.command import Run, run
from jaxft.pods.compute import ComputeSlices
from jaxft.pods.gcloud import Gcloud
from jaxft.pods.hosts import Reach
from jaxft.pods.request import Request
from jaxft.pods.slices import Slices
from jaxft.pods.tpu import TpuSlices

WORDS = {"compute": ("compute",), "tpu": ("compute", "tpus", "tpu-vm")}


def slices_of(
    request: Request,
    *,
    attempt: int,
    zone: str,
    hours: float | None = None,
    run: Run = run,
    sleep: Callable[[float], None] = time.sleep,
) -> Slices:
    """The slices of one creation, without a call yet.

    attempt: counts the creations of a run, from 1. hours: what is left of max_hours, after which Google deletes the
    machines where it can; None for all of it. sleep: waits between questions.
    """
    gcloud = Gcloud(run, request.project, pool_of(request.provider, zone))
    is_tpu = request.provider == "tpu"
    reach = Reach(
        gcloud, WORDS[request.provider], zone, by_number=is_tpu, internal_ip=request.internal_ip, iap=request.iap
    )
    make = TpuSlices if is_tpu else ComputeSlices
    left = request.max_hours if hours is None else hours
    return make(gcloud, reach, request, f"{request.name}-{attempt}", zone, left, sleep)


def pool_of(provider: str, zone: str) -> str:
    """Where machines come from and whose quota counts, in words."""
    if provider == "tpu":
        return f"the Cloud TPU API in {zone} (its quota counts in the zone, apart from Compute Engine's)"
    region = zone.rpartition("-")[0]
    return f"Compute Engine in {zone} (its quota counts in {region}, apart from the Cloud TPU API's)"


def project_of(project: str | None, run: Run = run) -> str:
    """The project, or gcloud's own if it is None. Raises PodError if gcloud has none."""
    if project is not None:
        return project
    own = Gcloud(run, None, "gcloud").call(["config", "get-value", "project"]).strip()
    if not own or own == "(unset)":
        raise PodError("No project is named: give --project=PROJECT, or run `gcloud config set project PROJECT`")
    return own
