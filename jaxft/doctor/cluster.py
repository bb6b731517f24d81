"""What a machine is told about the slice that it belongs to: by variables, or by Google Cloud's metadata server."""

import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from jaxft.doctor.part import Part
from jaxft.errors import counted

HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
WORKER = "TPU_WORKER_ID"
VARIABLES = (
    *HOSTS, WORKER, "TPU_ACCELERATOR_TYPE", "TPU_TOPOLOGY", "MEGASCALE_NUM_SLICES",
    "MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT", "JAX_PLATFORMS",
)  # fmt: skip
ATTRIBUTES = ("agent-worker-number", "worker-network-endpoints", "worker-id", "accelerator-type")
SERVER = "metadata.google.internal"
SERVER_VARIABLES = ("GCE_METADATA_IP", "GCE_METADATA_HOST")
SECONDS = 3.0
PRODUCT = Path("/sys/class/dmi/id/product_name")
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy answers for this server


def examine(environment: Mapping[str, str] | None = None, product: Path = PRODUCT) -> tuple[list[Part], int]:
    """(what variables say and what the metadata server of Google Cloud says; the hosts of the slice, 1 if unknown)."""
    environment = os.environ if environment is None else environment
    variables = _variables(environment)
    metadata, attributes = _metadata(environment, product)
    endpoints = attributes.get("worker-network-endpoints", "")
    hosts = max(len(_hosts(environment)), len(endpoints.split(",")) if endpoints else 0, 1)
    return [variables, metadata], hosts


def _hosts(environment: Mapping[str, str]) -> list[str]:
    names = next((environment[name] for name in HOSTS if environment.get(name)), "")
    return names.split(",") if names else []


def _variables(environment: Mapping[str, str]) -> Part:
    value = {name: environment[name] for name in VARIABLES if name in environment}
    text = ", ".join(f"{name}={words}" for name, words in value.items()) or "none is set"
    hosts, worker = _hosts(environment), environment.get(WORKER, "")
    mend = None
    # A single host needs no number: Kaggle sets TPU_PROCESS_ADDRESSES=local and nothing else.
    if hosts and (hosts[1:] or worker) and not (worker.isdecimal() and int(worker) < len(hosts)):
        is_set = f"is {worker!r}" if worker else "is not set"
        text += f": {counted(len(hosts), 'host', 'is', 'are')} named, and {WORKER} {is_set}"
        mend = f"Set {WORKER} on each host to its number, from 0 to {len(hosts) - 1}; GKE does so in pods of a JobSet."
    slices, number = (environment.get(f"MEGASCALE_{name}", "") for name in ("NUM_SLICES", "SLICE_ID"))
    if mend is None and slices.isdecimal() and not (number.isdecimal() and int(number) < int(slices)):
        text += f": there are {slices} slices, and MEGASCALE_SLICE_ID is {number or 'not set'}"
        mend = f"Set MEGASCALE_SLICE_ID on each host to the number of its slice, from 0 to {int(slices) - 1}."
    return Part(name="variables", text=text, value=value, mend=mend)


def _metadata(environment: Mapping[str, str], product: Path) -> tuple[Part, dict[str, str]]:
    """The part, and the attributes of this machine."""
    server = next((environment[name] for name in SERVER_VARIABLES if environment.get(name)), None)
    if server is None and not (product.is_file() and "Google" in product.read_text(encoding="utf-8", errors="replace")):
        return Part(name="metadata", text="this is no machine of Google Cloud"), {}
    attributes: dict[str, str] = {}
    for name in ATTRIBUTES:
        try:
            answer = _attribute(server or SERVER, name)
        except OSError as error:
            text = f"the metadata server does not answer: {getattr(error, 'reason', None) or error}"
            mend = (
                "JAX learns from it where the other hosts are. Try again in a minute; if it stays so, delete the "
                "machine and create it again, or give --coordinator, --num_processes and --process_id."
            )
            return Part(name="metadata", text=text, value=attributes, mend=mend), attributes
        if answer is not None:
            attributes[name] = answer
    text = ", ".join(f"{name}={words}" for name, words in attributes.items()) or "no attribute of a TPU"
    return Part(name="metadata", text=text, value=attributes), attributes


def _attribute(server: str, name: str) -> str | None:
    """An attribute of this machine, or None if it has none of that name. Raises OSError if the server fails."""
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with DIRECT.open(request, timeout=SECONDS) as answer:
            return answer.read(2**16).decode("utf-8", errors="replace").strip()
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 404:
                return None
        raise
