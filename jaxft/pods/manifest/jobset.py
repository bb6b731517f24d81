"""A JobSet: one Job for each slice, whose pods are its hosts.

Sources: the API of JobSet v1alpha2 (sigs.k8s.io), of Jobs in Kubernetes, and GKE's pages on TPUs, as they were in 2026.
"""

from typing import Any

from jaxft.config import RunConfig
from jaxft.errors import ExitCode
from jaxft.pods.machines import chips_of_host, machine_of
from jaxft.pods.manifest.mounted import FOLDER, config_map, inputs_of
from jaxft.pods.manifest.request import HUB_TOKEN, ManifestRequest
from jaxft.pods.pack.archive import CONFIG

TPU = "google.com/tpu"
GRACE_SECONDS = 300  # in which a run that got SIGTERM saves
START_SECONDS = 1800  # pods of one run start as their nodes are created and have pulled the image
KEEP_SECONDS = 7 * 24 * 3600  # of a JobSet that has ended, for its logs
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
RUN_LABEL = "jaxft-run"
# Each Job has a node pool of its own, which is a slice.
EXCLUSIVE = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}


def documents(
    request: ManifestRequest, config: RunConfig, labels: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """The ConfigMap and the JobSet. labels: of the JobSet, besides the run's.

    Raises ConfigError for files that cannot be carried.
    """
    mounted, volume = config_map(request, inputs_of(request, config))
    metadata: dict[str, Any] = {
        "name": request.name, "namespace": request.namespace, "labels": {RUN_LABEL: request.name, **(labels or {})},
    }  # fmt: skip
    if request.hosts > 1:  # node pools of single hosts hold several slices
        metadata["annotations"] = dict(EXCLUSIVE)
    spec = {
        "ttlSecondsAfterFinished": KEEP_SECONDS,
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "successPolicy": {"operator": "All"},
        "failurePolicy": {"maxRestarts": request.retries, "rules": _restart_rules()},
        "replicatedJobs": [{"name": "slice", "replicas": request.slices, "template": {"spec": _job(request, volume)}}],
    }
    jobset = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}
    return [mounted, jobset]


def _restart_rules() -> list[dict[str, Any]]:
    """What is not tried again: a run that was refused, and one that has used up its time. All else is, and counts."""
    return [
        {"name": "refused", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
        {"name": "overtime", "action": "FailJobSet", "onJobFailureReasons": ["DeadlineExceeded"]},
    ]


def _job(request: ManifestRequest, volume: dict[str, Any]) -> dict[str, Any]:
    refused = {"containerName": "jaxft", "operator": "In", "values": [int(ExitCode.REFUSED)]}
    return {
        "parallelism": request.hosts,
        "completions": request.hosts,
        "completionMode": "Indexed",
        # One pod that ends without success ends the Job, and the JobSet begins all of them again. So do a run that
        # was interrupted (75), a host that lost another one (69), and a node that is gone.
        "backoffLimit": 0,
        "activeDeadlineSeconds": round(request.max_hours * 3600),
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": refused}]},
        "template": {"metadata": {"labels": {RUN_LABEL: request.name}}, "spec": _pod(request, volume)},
    }


def _pod(request: ManifestRequest, volume: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "nodeSelector": node_labels(request),
        "tolerations": [{"key": TPU, "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [_container(request)],
        "volumes": [volume],
    }
    if request.spot:
        pod["tolerations"].append(
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        )
    if request.service_account is not None:
        pod["serviceAccountName"] = request.service_account
    return pod


def node_labels(request: ManifestRequest) -> dict[str, str]:
    """The labels of nodes on which the hosts of a slice may run."""
    labels = {
        "cloud.google.com/gke-tpu-accelerator": machine_of(request.shape).gke,
        "cloud.google.com/gke-tpu-topology": "x".join(map(str, request.shape.shape)),
    }
    if request.spot:
        labels["cloud.google.com/gke-spot"] = "true"
    if request.reservation is not None:
        labels["cloud.google.com/reservation-name"] = request.reservation
    return labels


def _container(request: ManifestRequest) -> dict[str, Any]:
    chips = chips_of_host(request.shape)
    return {
        "name": "jaxft",
        "image": request.image,
        "command": ["jaxft"],
        "args": train_arguments(request, CONFIG),
        "workingDir": FOLDER,
        "env": [_from_secret(request, key, required=True) for key in request.env if key != HUB_TOKEN]
        + [_from_secret(request, HUB_TOKEN, required=HUB_TOKEN in request.env)],
        # The files of the chips belong to root, and the driver locks more memory than a container may by default.
        "securityContext": {"privileged": True, "runAsUser": 0},
        # Of nothing else: a queue that covers chips alone would otherwise admit nothing.
        "resources": {"requests": {TPU: chips}, "limits": {TPU: chips}},
        "volumeMounts": [{"name": "run", "mountPath": FOLDER, "readOnly": True}],
    }


def train_arguments(request: ManifestRequest, config: str) -> list[str]:
    """The arguments of jaxft on each host, which finds the others by itself."""
    expected = [f"--expect_processes={request.processes}", "--expect_platform=tpu"]
    return ["train", f"--config={config}", *expected, f"--start_seconds={START_SECONDS}"]


def _from_secret(request: ManifestRequest, key: str, *, required: bool) -> dict[str, Any]:
    reference = {"name": request.secret, "key": key, "optional": not required}
    return {"name": key, "valueFrom": {"secretKeyRef": reference}}
