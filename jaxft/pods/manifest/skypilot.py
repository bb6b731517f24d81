"""A task of SkyPilot: one slice of the Cloud TPU API, on all hosts of which the task runs.

Source: the schema of tasks in SkyPilot 0.14.
"""

import sys
from typing import Any

from jaxft.config import RunConfig
from jaxft.errors import ExitCode
from jaxft.pods.command import quoted
from jaxft.pods.machines import accelerator_type, machine_of
from jaxft.pods.manifest.jobset import GRACE_SECONDS, train_arguments
from jaxft.pods.manifest.mounted import config_bytes, inputs_of
from jaxft.pods.manifest.request import ManifestRequest
from jaxft.pods.pack.archive import CONFIG
from jaxft.pods.pack.lock import PYTHON, extras_of
from jaxft.pods.pack.wheel import PACKAGE, is_checkout

IDLE_MINUTES = 20
FOLDER, ENVIRONMENT = "~/jaxft-run", "~/jaxft-venv"
END = "END-OF-CONFIG"


def documents(request: ManifestRequest, config: RunConfig) -> list[dict[str, Any]]:
    """The task. Raises ConfigError for files that cannot be carried."""
    inputs = inputs_of(request, config)
    task: dict[str, Any] = {"name": request.name, "num_nodes": 1, "resources": _resources(request)}
    if is_checkout():
        task["workdir"] = str(PACKAGE.parent)
    if inputs.files:
        task["file_mounts"] = {f"{FOLDER}/{name}": str(path.absolute()) for name, path in inputs.files.items()}
    if request.env:
        task["secrets"] = dict.fromkeys(request.env)  # each gets its value by --secret KEY of sky
    task["setup"] = _setup(config_bytes(inputs).decode(), extras_of(config))
    task["run"] = _run(request)
    return [task]


def _resources(request: ManifestRequest) -> dict[str, Any]:
    topology = request.shape
    interrupted = [int(ExitCode.PREEMPTED), int(ExitCode.PEER_LOST)]
    return {
        "infra": f"gcp/{request.zone.rpartition('-')[0]}/{request.zone}" if request.zone else "gcp",
        "accelerators": {f"tpu-{accelerator_type(topology)}": 1},
        # Always written: SkyPilot's own choice for v5e is the runtime of v5p.
        "accelerator_args": {"tpu_vm": True, "runtime_version": machine_of(topology).runtime},
        "use_spot": request.spot,
        "autostop": {"idle_minutes": IDLE_MINUTES, "down": True},
        "job_recovery": {
            "strategy": "EAGER_NEXT_REGION",
            "max_restarts_on_errors": request.retries,
            "recover_on_exit_codes": interrupted,
        },
    }


def _setup(config: str, extras: tuple[str, ...]) -> str:
    version = sys.modules["jaxft"].__version__
    source = f"'.[{','.join(extras)}]'" if is_checkout() else f"'jaxft[{','.join(extras)}]=={version}'"
    return "\n".join(
        [
            "set -e",
            "command -v uv || python3 -m pip install --user uv",
            'export PATH="$HOME/.local/bin:$PATH"',
            f"uv venv --allow-existing --python {PYTHON} {ENVIRONMENT}",
            f"uv pip install --python {ENVIRONMENT}/bin/python {source}",
            f"mkdir -p {FOLDER}",
            f"cat > {FOLDER}/{CONFIG} <<'{END}'",
            config,
            END,
            "",
        ]
    )


def _run(request: ManifestRequest) -> str:
    """timeout ends a run that has used up its hours, with a code (124) after which SkyPilot does not start it again."""
    seconds = round(request.max_hours * 3600)
    limit = f"timeout --kill-after={GRACE_SECONDS}s {seconds}s"
    return f"cd {FOLDER}\n{limit} {ENVIRONMENT}/bin/jaxft {quoted(train_arguments(request, CONFIG))}\n"
