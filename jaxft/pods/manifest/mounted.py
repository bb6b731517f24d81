"""The config of a run and the small files that it names, as a ConfigMap that every pod mounts as its working folder."""

import base64
import json
from collections.abc import Mapping
from typing import Any

from jaxft.config import RunConfig
from jaxft.errors import ConfigError
from jaxft.pods.manifest.request import ManifestRequest
from jaxft.pods.pack.archive import CONFIG, hub_token, refuse_secrets
from jaxft.pods.pack.inputs import Inputs

LARGEST = 900_000  # bytes; Kubernetes takes 1 MiB for a whole object
FOLDER = "/etc/jaxft"


def config_bytes(inputs: Inputs) -> bytes:
    """config.json for the hosts."""
    return json.dumps(inputs.values, indent=1, ensure_ascii=False).encode()


def refuse_hub_token(inputs: Inputs) -> None:
    """Raises ConfigError if the Hugging Face token of this machine is in the config or in a file that it names."""
    refuse_secrets({CONFIG: config_bytes(inputs)}, inputs.files, hub_token())


def inputs_of(request: ManifestRequest, config: RunConfig) -> Inputs:
    """What the run reads on this machine, with the folder to which it goes. Raises ConfigError as `Inputs` does."""
    inputs = Inputs(config)
    inputs.values["output_dir"] = request.to
    refuse_hub_token(inputs)
    return inputs


def config_map(request: ManifestRequest, inputs: Inputs) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the ConfigMap, the volume that shows its files under their names).

    Raises ConfigError if the files are too large for it.
    """
    contents = {CONFIG: config_bytes(inputs)} | {name: path.read_bytes() for name, path in inputs.files.items()}
    size = sum(map(len, contents.values()))
    if size > LARGEST:
        raise ConfigError(
            f"the files that the config names have {size / 1e6:.1f} MB, and a ConfigMap of Kubernetes takes "
            f"{LARGEST / 1e6:.1f} MB. Copy the largest to a bucket (gcloud storage cp FILE gs://BUCKET/) and name them "
            "as gs://BUCKET/FILE:\n" + "\n".join(inputs.described)
        )
    keys = {name: name if name == CONFIG else f"input-{number}" for number, name in enumerate(contents)}
    name = f"{request.name}-config"
    document: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": request.namespace},
        **_texts_and_bytes({keys[file]: content for file, content in contents.items()}),
    }
    items = [{"key": key, "path": file} for file, key in keys.items()]
    return document, {"name": "run", "configMap": {"name": name, "items": items}}


def _texts_and_bytes(contents: Mapping[str, bytes]) -> dict[str, dict[str, str]]:
    """Files that are text as they are, which people can read, and others in base64."""
    texts, others = {}, {}
    for key, content in contents.items():
        try:
            texts[key] = content.decode("utf-8")
        except UnicodeDecodeError:
            others[key] = base64.b64encode(content).decode("ascii")
    return {"data": texts} | ({"binaryData": others} if others else {})
