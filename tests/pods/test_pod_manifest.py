"""Files for JobSet, Kueue and SkyPilot: the schemas of those who read them, what they may cost, and what is refused."""

import copy
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from manifest_schemas import SCHEMAS, SKYPILOT

from jaxft import cli
from jaxft.assets import ASSETS
from jaxft.config import load
from jaxft.errors import ConfigError, ExitCode
from jaxft.files.paths import open_folder
from jaxft.pods.manifest import KINDS, ManifestRequest, manifest
from jaxft.pods.manifest.mounted import LARGEST

CONFIG = load("configs/quickstart.py:smoke")
IMAGE = "us-docker.pkg.dev/p1/images/jaxft:1"
KUBERNETES = "1.34"
SHAPES = [
    "v5e:2x4",
    "tpu7x:2x2x2",
    *(
        pytest.param(shape, marks=pytest.mark.slow)
        for shape in ("v4:2x2x2", "v5e:4x4", "v5p:2x2x1", "v6e:1x1", "v6e:4x8")
    ),
]


def request(kind: str = "jobset", **options: Any) -> ManifestRequest:
    return ManifestRequest(
        **{"kind": kind, "name": "r1", "topology": "v6e:4x4", "to": "gs://bucket/r1", "image": IMAGE} | options
    )


def documents(kind: str = "jobset", **options: Any) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(manifest(request(kind, **options), CONFIG)))


def one(kind: str, all_of_them: list[dict[str, Any]]) -> dict[str, Any]:
    (document,) = (document for document in all_of_them if document["kind"] == kind)
    return document


def job_of(jobset: dict[str, Any]) -> dict[str, Any]:
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "r1"}} | replicated["template"]


def check(document: dict[str, Any]) -> None:
    """Raises the ValidationError of whatever is no field of what reads the document."""
    if document.get("kind") == "ConfigMap":
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    jsonschema.validate(document, SCHEMAS[document["kind"]] if "kind" in document else SKYPILOT)
    if document.get("kind") == "JobSet":
        kubernetes_validate.validate(job_of(document), KUBERNETES, strict=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spot", [False, True], ids=["demand", "spot"])
def test_every_file_has_only_fields_that_its_reader_knows(kind: str, shape: str, spot: bool) -> None:
    if kind == "skypilot" and shape.startswith("tpu7x"):
        pytest.skip("refused")
    options = {"env": ("WANDB_API_KEY",), "spot": spot, "service_account": "trainer"}
    for document in documents(kind, topology=shape, **options):
        check(document)


def paths(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every field whose name the reader defines."""
    free = {"labels", "annotations", "nodeSelector", "nodeLabels", "data", "accelerators", "file_mounts", "secrets",
            "requests", "limits", "namespaceSelector"}  # fmt: skip
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        if isinstance(key, str):
            yield (*before, key)
        if key not in free:
            yield from paths(inner, (*before, key))


@pytest.mark.parametrize(
    ("kind", "every"),
    [
        ("jobset", 7),
        ("kueue", 7),
        ("skypilot", 1),
        *(pytest.param(kind, 1, marks=pytest.mark.slow) for kind in KINDS[:2]),
    ],
)
def test_a_typo_in_any_field_would_be_seen(kind: str, every: int) -> None:
    errors = (
        jsonschema.ValidationError,
        kubernetes_validate.ValidationError,
        kubernetes_validate.utils.SchemaNotFoundError,
    )
    for document in documents(kind, spot=True):
        if document.get("kind") == "ConfigMap":
            continue
        for *above, name in [*paths(document)][::-every]:
            if name in ("kind", "apiVersion") and not above:
                continue
            wrong = copy.deepcopy(document)
            node = wrong
            for key in above:
                node = node[key]
            node[f"{name}x"] = node.pop(name)
            with pytest.raises(errors):
                check(wrong)


@pytest.mark.parametrize(("shape", "slices", "hosts", "chips"), [("v6e:4x4", 1, 4, 4), ("v5e:2x4", 3, 1, 8)])
def test_each_slice_is_a_job_with_a_pod_on_every_host(shape: str, slices: int, hosts: int, chips: int) -> None:
    jobset = one("JobSet", documents(topology=shape, slices=slices))
    job, pod = job_of(jobset)["spec"], job_of(jobset)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == slices
    assert job["parallelism"] == job["completions"] == hosts
    assert container["resources"] == {"requests": {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}}
    assert f"--expect_processes={hosts * slices}" in container["args"] and "--expect_platform=tpu" in container["args"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == shape.partition(":")[2]
    # A node pool is a slice only where a slice has several hosts.
    assert ("annotations" in jobset["metadata"]) == (hosts > 1)


def test_what_is_tried_again_and_what_is_not() -> None:
    """One attempt fails as a whole; a refusal and the time limit are final, everything else counts as a restart."""
    jobset = one("JobSet", documents(retries=5, max_hours=1.5))
    job = job_of(jobset)["spec"]
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["activeDeadlineSeconds"] == 5400 and job["template"]["spec"]["terminationGracePeriodSeconds"] == 300
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [ExitCode.REFUSED]
    policy = jobset["spec"]["failurePolicy"]
    final = {reason for rule in policy["rules"] for reason in rule["onJobFailureReasons"]}
    assert policy["maxRestarts"] == 5 and final == {"PodFailurePolicy", "DeadlineExceeded"}
    assert {rule["action"] for rule in policy["rules"]} == {"FailJobSet"}


def test_a_queue_that_covers_chips_alone_admits_the_run() -> None:
    """Kueue leaves a pod waiting for ever that requests what its ClusterQueue does not cover."""
    every = documents("kueue", topology="v5e:4x4", slices=2, max_hours=2, queue="team")
    jobset, queue = one("JobSet", every), one("ClusterQueue", every)
    (group,) = queue["spec"]["resourceGroups"]
    (flavor,) = group["flavors"]
    job = job_of(jobset)["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert set(container["resources"]["requests"]) == set(group["coveredResources"])
    need = container["resources"]["requests"]["google.com/tpu"] * job["parallelism"] * 2
    assert flavor["resources"] == [{"name": "google.com/tpu", "nominalQuota": need}]
    assert one("ResourceFlavor", every)["metadata"]["name"] == flavor["name"]
    assert one("ResourceFlavor", every)["spec"]["nodeLabels"] == job["template"]["spec"]["nodeSelector"]
    assert one("LocalQueue", every)["spec"]["clusterQueue"] == queue["metadata"]["name"]
    labels = jobset["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == one("LocalQueue", every)["metadata"]["name"] == "team"
    assert labels["kueue.x-k8s.io/max-exec-time-seconds"] == "7200"


def mounted(folder: Path, config_map: dict[str, Any], jobset: dict[str, Any]) -> Path:
    """The files as a pod sees them: the kubelet shows the first part of each path as a link into a hidden folder."""
    (volume,) = job_of(jobset)["spec"]["template"]["spec"]["volumes"]
    assert volume["configMap"]["name"] == config_map["metadata"]["name"]
    hidden = folder / "..2026_11_29"
    for item in volume["configMap"]["items"]:
        path = hidden / item["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(config_map["data"][item["key"]], encoding="utf-8")
    (folder / "..data").symlink_to(hidden.name)
    for entry in hidden.iterdir():
        (folder / entry.name).symlink_to(f"..data/{entry.name}")
    return folder


def test_a_pod_reads_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = documents(to="gs://bucket/elsewhere")
    monkeypatch.chdir(mounted(tmp_path, one("ConfigMap", every), one("JobSet", every)))
    (argument,) = (
        argument.partition("=")[2]
        for argument in job_of(one("JobSet", every))["spec"]["template"]["spec"]["containers"][0]["args"]
        if argument.startswith("--config=")
    )
    config = load(argument)
    assert config.output_dir == "gs://bucket/elsewhere" and config.train == CONFIG.train
    assert Path(config.data.train).read_bytes() == Path(CONFIG.data.train).read_bytes()
    folder = open_folder(config.model.path)
    assert folder.names() == sorted(os.listdir(CONFIG.model.path)) and folder.size("tokenizer.json")


@pytest.mark.parametrize("kind", ["jobset", "kueue"])
def test_secrets_come_from_the_cluster_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdef")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    text = manifest(request(kind, env=("WANDB_API_KEY",), secret="mine"), CONFIG)
    assert "0123456789abcdef" not in text
    jobset = one("JobSet", list(yaml.safe_load_all(text)))
    (container,) = job_of(jobset)["spec"]["template"]["spec"]["containers"]
    references = {entry["name"]: entry["valueFrom"]["secretKeyRef"] for entry in container["env"]}
    assert references["WANDB_API_KEY"] == {"name": "mine", "key": "WANDB_API_KEY", "optional": False}
    assert references["HF_TOKEN"]["optional"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_in_a_file_of_the_run_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdef")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "hf_0123456789abcdef"}\n')
    with pytest.raises(ConfigError, match=r"rows.jsonl holds the value of HF_TOKEN"):
        manifest(request(kind), load("configs/quickstart.py:smoke", {"data.train": str(rows)}))


def test_a_task_of_skypilot_names_its_runtime_and_its_end() -> None:
    (task,) = documents("skypilot", topology="v5e:4x4", env=("HF_TOKEN",), max_hours=2, zone="us-west4-a", spot=True)
    resources = task["resources"]
    assert resources["accelerators"] == {"tpu-v5litepod-16": 1} and resources["infra"] == "gcp/us-west4/us-west4-a"
    assert resources["accelerator_args"]["runtime_version"] == "v2-alpha-tpuv5-lite" and resources["use_spot"]
    assert resources["autostop"]["down"]
    codes = resources["job_recovery"]["recover_on_exit_codes"]
    assert ExitCode.PREEMPTED in codes and ExitCode.REFUSED not in codes and 124 not in codes
    assert "timeout --kill-after=300s 7200s" in task["run"] and "--expect_processes=4" in task["run"]
    assert task["secrets"] == {"HF_TOKEN": None}


def test_the_commands_of_a_task_make_the_same_run(tmp_path: Path) -> None:
    """Its setup and its command, with stand-ins for uv and jaxft, leave config and files where the run reads them."""
    (task,) = documents("skypilot", to="gs://bucket/elsewhere")
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "uv").write_text("#!/bin/sh\nexit 0\n")
    jaxft = tmp_path / "jaxft-venv" / "bin" / "jaxft"
    jaxft.parent.mkdir(parents=True)
    jaxft.write_text('#!/bin/sh\necho "$PWD $@" > "$HOME/called"\nexit 75\n')
    for file in (programs / "uv", jaxft):
        file.chmod(0o755)
    for target, source in task["file_mounts"].items():
        path = tmp_path / target.removeprefix("~/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(Path(source).read_bytes())
    env = {"HOME": str(tmp_path), "PATH": f"{programs}:/usr/bin:/bin"}
    codes = [subprocess.run(["bash", "-c", task[part]], env=env, check=False).returncode for part in ("setup", "run")]
    assert codes == [0, 75]
    folder = tmp_path / "jaxft-run"
    assert (tmp_path / "called").read_text().startswith(f"{folder} train --config=config.json --expect_processes=4")
    values = json.loads((folder / "config.json").read_text())
    assert values["output_dir"] == "gs://bucket/elsewhere" and (folder / values["data"]["train"]).is_file()


@pytest.mark.parametrize(
    ("kind", "cost"),
    [
        ("jobset", r"at most 8.0 h, USD 345.60 \(16 v6e x 2.70\), in 4 attempts of 2 h each"),
        ("kueue", r"at most 2.0 h, USD 86.40 \(16 v6e x 2.70\)\."),
    ],
)
def test_the_worst_case_stands_at_the_head(kind: str, cost: str, tmp_path: Path) -> None:
    prices = tmp_path / "prices.json"
    prices.write_text('{"date": "2026-01-01", "chips": {"v6e": {"on_demand": 2.7, "spot": null}}}')
    text = manifest(request(kind, max_hours=2, prices=str(prices)), CONFIG)
    head = text[: text.index("---")]
    assert re.search(cost, head), head
    with pytest.raises(ConfigError, match="no spot price of v6e"):
        manifest(request(kind, spot=True, prices=str(prices)), CONFIG)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"kind": "helm"}, "--kind=helm: write one of jobset, kueue, skypilot"),
    "name": ({"name": "Run_1"}, "--name=Run_1: .* Write --name=run-1"),
    "namespace": ({"namespace": "a_b"}, "--namespace=a_b: names in Kubernetes"),
    "to": ({"to": "runs/1"}, r"--to=runs/1: .*--to=gs://BUCKET/RUN"),
    "a bucket alone": ({"to": "gs://b/"}, r"--to=gs://b/: .*inside a bucket"),
    "env": ({"env": ("HF_TOKEN=hf_1",)}, "--env=HF_TOKEN=hf_1 is not the name"),
    "no image": ({"image": None}, "needs --image, a container with jaxft: build it from tpu_scripts/Dockerfile"),
    "image": ({"image": "my image"}, "--image=my image is no name of a container image"),
    "hours": ({"max_hours": 0}, "--max_hours=0 must be above zero"),
    "retries": ({"retries": -1}, "--retries=-1 must be zero or more"),
    "shape": ({"topology": "v6e:3x3"}, "no such slice of v6e"),
    "gpu": ({"topology": "h100:8"}, "h100 is none"),
    "slices in SkyPilot": ({"kind": "skypilot", "slices": 2}, "SkyPilot does not join slices"),
    "a kind that SkyPilot lacks": ({"kind": "skypilot", "topology": "tpu7x:2x2x1"}, "which has no tpu7x"),
    "zone": ({"kind": "skypilot", "zone": "us-west4"}, "--zone=us-west4 is no name of a zone"),
    "reservation in SkyPilot": ({"kind": "skypilot", "reservation": "r"}, "specific_reservations"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_another_program_would_refuse_is_refused_here(case: tuple[dict[str, Any], str]) -> None:
    options, match = case
    with pytest.raises(ConfigError, match=match):
        request(**options)


def test_spot_machines_need_checkpoints() -> None:
    config = load("configs/quickstart.py:smoke", {"checkpoint.every": None})
    with pytest.raises(ConfigError, match="without checkpoint.every all steps"):
        manifest(request(spot=True), config)
    manifest(request(), config)


def test_files_that_are_too_large_for_a_config_map_are_refused(tmp_path: Path) -> None:
    row = (ASSETS / "smoke" / "prompts.jsonl").read_text().splitlines()[0]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f"{row}\n" * (LARGEST // len(row) + 1))
    config = load("configs/quickstart.py:smoke", {"data.train": str(rows)})
    with pytest.raises(ConfigError, match=r"Copy the largest to a bucket[\s\S]*rows.jsonl"):
        manifest(request(), config)
    (task,) = yaml.safe_load_all(manifest(request("skypilot"), config))
    assert str(rows) in task["file_mounts"].values()


def test_the_command_writes_the_file_alone(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["pod", "manifest", "--kind=kueue", "--config=quickstart:smoke", "--topology=v6e:4x4",
               "--to=gs://bu/My_Run", f"--image={IMAGE}", "--env=A", "--env=B", "--config.train.steps=7"]  # fmt: skip
    assert cli.main(command) == ExitCode.DONE
    every = list(yaml.safe_load_all(capsys.readouterr().out))
    assert one("JobSet", every)["metadata"]["name"] == "my-run"
    assert json.loads(one("ConfigMap", every)["data"]["config.json"])["train"]["steps"] == 7
    assert cli.main([*command, "--json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out)["documents"] == every
    assert cli.main([*command, "--spot", "--to=runs/1"]) == ExitCode.REFUSED
    assert "--to=gs://BUCKET/RUN" in capsys.readouterr().err
