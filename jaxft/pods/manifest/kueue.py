"""A JobSet that waits in a queue of Kueue, and the queue with the quota that the run needs.

Source: the API of Kueue v1beta2 (sigs.k8s.io), as it was in 2026.
"""

from typing import Any

from jaxft.config import RunConfig
from jaxft.pods.manifest import jobset
from jaxft.pods.manifest.request import ManifestRequest

VERSION = "kueue.x-k8s.io/v1beta2"
# Kueue ends a run that has been admitted for so long, over all of its attempts.
TIME_LABEL = "kueue.x-k8s.io/max-exec-time-seconds"


def documents(request: ManifestRequest, config: RunConfig) -> list[dict[str, Any]]:
    """The flavor of the nodes, the queues, and what `jobset.documents` makes. Raises ConfigError as that does."""
    labels = {jobset.QUEUE_LABEL: request.queue, TIME_LABEL: str(round(request.max_hours * 3600))}
    return [*_queues(request), *jobset.documents(request, config, labels)]


def _queues(request: ManifestRequest) -> list[dict[str, Any]]:
    flavor = request.shape.name.replace(":", "-") + ("-spot" if request.spot else "")
    quota = {"name": jobset.TPU, "nominalQuota": request.shape.chips}
    flavors = [{"name": flavor, "resources": [quota]}]
    cluster_queue = {
        "namespaceSelector": {},
        "queueingStrategy": "BestEffortFIFO",
        "resourceGroups": [{"coveredResources": [jobset.TPU], "flavors": flavors}],
    }
    local = {"name": request.queue, "namespace": request.namespace}
    return [
        _document("ResourceFlavor", {"name": flavor}, {"nodeLabels": jobset.node_labels(request)}),
        _document("ClusterQueue", {"name": request.queue}, cluster_queue),
        _document("LocalQueue", local, {"clusterQueue": request.queue}),
    ]


def _document(kind: str, metadata: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": VERSION, "kind": kind, "metadata": metadata, "spec": spec}
