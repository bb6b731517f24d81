"""The fields that jaxft writes of a JobSet, of Kueue's objects and of a SkyPilot task, and nothing more.

Read from the published definitions: JobSet v1alpha2 (jobset.x-k8s.io_jobsets.yaml), Kueue v1beta2
(kueue.x-k8s.io_*.yaml), SkyPilot 0.14 (sky/utils/schemas.py). A field that is none of these is a typo. The Job inside a
JobSet is validated by kubernetes-validate.
"""

from typing import Any

TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
TEXTS: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "string"}}


def fields(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """An object with these fields and no others."""
    return {
        "type": "object", "required": list(required), "properties": required | (optional or {}),
        "additionalProperties": False,
    }  # fmt: skip


def items(schema: dict[str, Any]) -> dict[str, Any]:
    """A list of at least one of them."""
    return {"type": "array", "minItems": 1, "items": schema}


def of_kind(version: str, kind: str, spec: dict[str, Any], *, namespaced: bool = True) -> dict[str, Any]:
    """An object of Kubernetes."""
    metadata = {"name": TEXT} | ({"namespace": TEXT} if namespaced else {})
    return fields(
        {
            "apiVersion": {"const": version},
            "kind": {"const": kind},
            "metadata": fields(metadata, {"labels": TEXTS, "annotations": TEXTS}),
            "spec": spec,
        }
    )


ACTIONS = [
    "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob", "RestartJobAndIgnoreMaxRestarts",
]  # fmt: skip
# Of those that the webhook of JobSet knows, the ones that can be reached with a podFailurePolicy and a deadline.
REASONS = ["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"]
JOBSET = of_kind(
    "jobset.x-k8s.io/v1alpha2",
    "JobSet",
    fields(
        {
            "replicatedJobs": items(
                fields({"name": TEXT, "replicas": COUNT, "template": fields({"spec": {"type": "object"}})})
            ),
            "failurePolicy": fields(
                {"maxRestarts": COUNT},
                {
                    "rules": items(
                        fields(
                            {"name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                             "action": {"enum": ACTIONS}},
                            {"onJobFailureReasons": items({"enum": REASONS})},
                        )
                    )
                },
            ),
            "successPolicy": fields({"operator": {"enum": ["All", "Any"]}}),
            "network": fields({}, {name: {"type": "boolean"} for name in
                                   ("enableDNSHostnames", "publishNotReadyAddresses")}),
        },
        {"ttlSecondsAfterFinished": COUNT},
    ),
)  # fmt: skip

KUEUE = "kueue.x-k8s.io/v1beta2"
QUOTA = fields({"name": TEXT, "nominalQuota": {"type": ["integer", "string"]}})
FLAVORS = items(fields({"name": TEXT, "resources": items(QUOTA)}))
CLUSTER_QUEUE = fields(
    {"resourceGroups": items(fields({"coveredResources": items(TEXT), "flavors": FLAVORS}))},
    {"namespaceSelector": {"const": {}}, "queueingStrategy": {"enum": ["StrictFIFO", "BestEffortFIFO"]}},
)
SCHEMAS = {
    "JobSet": JOBSET,
    "ResourceFlavor": of_kind(KUEUE, "ResourceFlavor", fields({"nodeLabels": TEXTS}), namespaced=False),
    "ClusterQueue": of_kind(KUEUE, "ClusterQueue", CLUSTER_QUEUE, namespaced=False),
    "LocalQueue": of_kind(KUEUE, "LocalQueue", fields({"clusterQueue": TEXT})),
}

CODE = {"type": "integer", "minimum": 0, "maximum": 255}
SKYPILOT = fields(
    {
        "name": TEXT,
        "num_nodes": {"type": "integer", "minimum": 1},
        "resources": fields(
            {
                "infra": TEXT,
                "accelerators": {"type": "object", "maxProperties": 1, "additionalProperties": {"type": "number"}},
                "accelerator_args": fields({"runtime_version": TEXT}, {"tpu_vm": {"type": "boolean"}}),
                "use_spot": {"type": "boolean"},
                "autostop": fields({"idle_minutes": COUNT, "down": {"type": "boolean"}}),
            },
            {
                "job_recovery": fields(
                    {"strategy": TEXT, "max_restarts_on_errors": COUNT},
                    {"recover_on_exit_codes": items(CODE)},
                ),
            },
        ),
        "setup": TEXT,
        "run": TEXT,
    },
    {"workdir": TEXT, "file_mounts": TEXTS, "secrets": {"additionalProperties": {"type": ["string", "null"]}}},
)
