"""The text of a file, with its worst case as a comment at its head."""

import sys
from collections.abc import Callable
from typing import Any

import yaml

from jaxft.config import RunConfig
from jaxft.pods.manifest import jobset, kueue, skypilot
from jaxft.pods.manifest.request import ManifestRequest

WRITERS: dict[str, Callable[[ManifestRequest, RunConfig], list[dict[str, Any]]]] = {
    "jobset": jobset.documents,
    "kueue": kueue.documents,
    "skypilot": skypilot.documents,
}
# On the side of the server, since a ConfigMap with files is too large for the annotation that kubectl would make.
KUBECTL = "kubectl apply --server-side -f FILE"


class _Writer(yaml.SafeDumper):
    """Writes texts of several lines as blocks, which people can read, and never a reference to an earlier part."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(writer: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return writer.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Writer.add_representer(str, _text)


def manifest(request: ManifestRequest, config: RunConfig) -> str:
    """The file of a run, as YAML. The files of this machine that the config names are in it, if they are small.

    Raises ConfigError for a config that would lose its work there, and for files that cannot be carried.
    """
    request.check_config(config)
    documents = WRITERS[request.kind](request, config)
    sky = " ".join(["sky jobs launch FILE", *(f"--secret {key}" for key in request.env)])
    head = [
        f"Written by jaxft {sys.modules['jaxft'].__version__}. To start it: "
        f"{sky if request.kind == 'skypilot' else KUBECTL}",
        f"{request.shape.describe()}, {request.processes} hosts: {request.worst_case}.",
        f"Prices of {request.rate.date}; nodes cost from their creation on, which is not counted here.",
    ]
    texts = [yaml.dump(one, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=120) for one in documents]
    return "".join(f"# {line}\n" for line in head) + "---\n".join(["", *texts])
