"""The real gcloud against a cloud on loopback: what it sends, what it answers, and each fault that the cloud brings."""

import dataclasses
import os
import shlex
import shutil
import subprocess

import pytest
from cloud_server import Cloud, Refusal, environment, start

from jaxft.errors import PodError
from jaxft.pods.command import Done
from jaxft.pods.dry_run import DryRun
from jaxft.pods.gcloud import CapacityError
from jaxft.pods.providers import slices_of
from jaxft.pods.request import Request
from jaxft.pods.slices import Phase

pytestmark = pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not on this machine")
BASE = Request(
    name="run-1", topology="v5e:2x4", zones=("us-east5-b",), to="gs://bucket/run-1", project="my-project", max_hours=4.0
)


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    with start(Cloud()) as one:
        for key in set(os.environ) - set(environment(one, tmp_path)):
            monkeypatch.delenv(key)
        for key, value in environment(one, tmp_path).items():
            monkeypatch.setenv(key, value)
        yield one


def slices_on(cloud, **options):
    request = dataclasses.replace(BASE, **options)
    cloud.hosts = request.hosts
    return slices_of(request, attempt=1, zone="us-east5-b", sleep=lambda seconds: None)


def test_a_node_from_quota_to_deletion(cloud):
    answers = [Refusal(429, "Quota limit 'TPUV5sLitepodPerProjectPerZone' has been exceeded.", "RESOURCE_EXHAUSTED")]
    cloud.refuse = lambda method, collection, name: answers.pop() if method == "POST" and answers else None
    slices = slices_on(cloud)
    with pytest.raises(CapacityError, match=r"Cloud TPU API in us-east5-b .*\(quota\).*TPUV5sLitepodPerProjectPerZone"):
        slices.create()
    slices.create()
    assert cloud.alive == ["nodes/run-1-1"]
    slices.delete()
    assert not cloud.alive and cloud.log == ["POST nodes/run-1-1", "POST nodes/run-1-1", "DELETE nodes/run-1-1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "made"),
    [
        ({"topology": "v4:2x2x2", "spot": True}, ["nodes/run-1-1"]),
        ({"slices": 2, "topology": "v5e:4x4"},
         ["nodes/run-1-1-0", "nodes/run-1-1-1", "queuedResources/run-1-1"]),
        ({"flex_start": True}, ["nodes/run-1-1", "queuedResources/run-1-1"]),
        ({"reservation": "r1"}, ["nodes/run-1-1", "queuedResources/run-1-1"]),
        ({"topology": "v6e:2x4", "spot": True, "iap": True}, ["instances/run-1-1"]),
        ({"topology": "v6e:2x4", "slices": 2}, ["instances/run-1-1-0", "instances/run-1-1-1"]),
        ({"topology": "tpu7x:2x2x2"},
         ["instanceGroupManagers/run-1-1", "instanceTemplates/run-1-1", "instances/run-1-1-0000",
          "instances/run-1-1-0001", "resourcePolicies/run-1-1"]),
    ],
    ids=["node", "slices", "flex-start", "reservation", "instance", "instances", "group"],
)  # fmt: skip
def test_a_whole_life(cloud, options, made):
    slices = slices_on(cloud, **options)
    assert slices.state().phase == Phase.ABSENT
    slices.create()
    assert sorted(cloud.alive) == made
    slices.create()  # again, as after an interruption: nothing is doubled
    assert sorted(cloud.alive) == made
    assert slices.state().phase == Phase.READY
    workers = slices.workers()
    assert len(workers) == slices.request.hosts * slices.request.slices
    assert len({one.address for one in workers}) == len(workers)
    slices.delete()
    assert not cloud.alive and slices.state().phase == Phase.ABSENT
    slices.delete()  # again


@pytest.mark.slow
def test_a_pasted_dry_run_gives_the_same_log(cloud, tmp_path):
    for options in ({"topology": "v5e:4x4", "slices": 2}, {"topology": "v6e:2x4"}, {"topology": "v6e:4x4"}):
        lives = []
        for paper in (False, True):
            cloud.log.clear()
            request = dataclasses.replace(BASE, **options)
            cloud.hosts, lines = request.hosts, []
            how = {"run": DryRun(request, lines.append, lambda argv: Done(0, "", ""))} if paper else {}
            slices = slices_of(request, attempt=1, zone="us-east5-b", sleep=lambda seconds: None, **how)
            slices.create()
            slices.state()
            slices.workers()
            slices.delete()
            if paper:
                assert not cloud.log
                script = tmp_path / "pasted.sh"
                script.write_text("\n".join(lines))
                subprocess.run(["bash", str(script)], check=False, capture_output=True)
            lives.append(list(cloud.log))
            assert not cloud.alive
        assert lives[0] == lives[1] and lives[0], options


@pytest.mark.slow
def test_a_queue_waits_then_is_active_then_preempted(cloud):
    slices = slices_on(cloud, queue_hours=2.0)
    cloud.states["queuedResources"] = ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    cloud.states["nodes"] = ["CREATING", "READY", "PREEMPTED"]
    slices.create()
    phases = [slices.state().phase for _ in range(6)]
    assert phases == [Phase.WAITING, Phase.WAITING, Phase.CREATING, Phase.CREATING, Phase.READY, Phase.LOST]
    cloud.states["queuedResources"] = ["SUSPENDED"]
    assert slices.state().phase == Phase.LOST
    cloud.lasting = 3
    slices.delete()
    assert not cloud.alive


@pytest.mark.slow
@pytest.mark.parametrize("word", ["PREEMPTED", "REPAIRING"])
def test_a_lost_node(cloud, word):
    slices = slices_on(cloud)
    slices.create()
    cloud.states["nodes"] = [word]
    assert (slices.state().phase, slices.state().raw) == (Phase.LOST, word)


@pytest.mark.slow
def test_a_node_under_maintenance(cloud):
    slices = slices_on(cloud)
    slices.create()
    cloud.health = "UNHEALTHY_MAINTENANCE"
    assert (slices.state().phase, slices.state().raw) == (Phase.LOST, "UNHEALTHY_MAINTENANCE")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({}, {"code": 8, "message": 'There is no more capacity in the zone "us-east5-b"'}, r"Cloud TPU.*\(capacity\)"),
        ({"topology": "v6e:2x4"},
         {"code": "ZONE_RESOURCE_POOL_EXHAUSTED", "message": "The zone does not have enough resources available"},
         r"Compute Engine in us-east5-b.*\(capacity\).*enough resources"),
        ({"topology": "v6e:2x4"},
         {"code": "QUOTA_EXCEEDED", "message": "Quota 'TPUS_PER_TPU_FAMILY' exceeded. Limit: 0.0 in region us-east5"},
         r"quota counts in us-east5.*\(quota\).*TPUS_PER_TPU_FAMILY"),
    ],
    ids=["tpu, capacity", "compute, capacity", "compute, quota"],
)  # fmt: skip
def test_no_machines_here(cloud, options, error, match):
    cloud.failed = lambda collection, name: error
    with pytest.raises(CapacityError, match=match):
        slices_on(cloud, **options).create()
    assert not cloud.alive


@pytest.mark.slow
def test_what_the_account_may_not_do(cloud):
    cloud.refuse = lambda method, collection, name: Refusal(
        403, "Permission tpu.nodes.create denied", "PERMISSION_DENIED"
    )
    with pytest.raises(PodError, match="tpu.nodes.create.*role that the message names") as raised:
        slices_on(cloud).create()
    assert not isinstance(raised.value, CapacityError)


SSH = """#!/bin/bash
# Plays the host: what stands behind its name is the command, which ssh joins with spaces. Standard input arrives too.
if [[ "$0" == *ssh ]]; then
  while [[ "$1" != *@* ]]; do shift; done
  shift
  if [[ "$1" == -- ]]; then shift; fi
  exec bash -c "$*"
fi
printf '%s\\n' "$@" > "$HOME/scp"
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"topology": "v6e:2x4"}], ids=["tpu", "compute"])
def test_a_command_on_a_host_keeps_its_words_its_input_and_its_code(cloud, tmp_path, monkeypatch, options):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("ssh", "scp", "ssh-keygen"):
        (programs / name).write_text(SSH)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    keys = tmp_path / ".ssh"
    keys.mkdir()
    for name in ("google_compute_engine", "google_compute_engine.pub"):
        (keys / name).write_text("ssh-rsa AAAA user@host\n")
    slices = slices_on(cloud, **options)
    slices.create()
    worker = slices.workers()[0]
    done = slices.ssh(worker, ["sh", "-c", 'cat; echo "$0"; exit 7', "a  b'c"], stdin=b"secret\n")
    assert (done.code, done.out) == (7, "secret\na  b'c\n"), done.err
    slices.copy(worker, tmp_path / "file", "there")
    assert shlex.join((tmp_path / "scp").read_text().split("\n")).endswith("there ''")
