"""`jaxft pod list`, and the deletion of all that has the label, whatever this machine remembers."""

import dataclasses

import pytest

from jaxft import cli
from jaxft.errors import PodError
from jaxft.pods import command
from jaxft.pods.command import Done
from jaxft.pods.dry_run import DryRun
from jaxft.pods.owned import delete_owned, owned
from jaxft.pods.providers import slices_of
from jaxft.pods.request import Request

BASE = Request(name="run-1", topology="v5e:4x4", zones=("us-east5-b",), to="gs://bucket/r", project="my-project")


def project_with(*requests):
    """A cloud on paper in which all the requests were created."""
    cloud = DryRun(requests[0], lambda line: None, lambda argv: Done(0, "", ""))
    for request in requests:
        cloud.request = request
        slices_of(request, attempt=1, zone="us-east5-b", run=cloud).create()
    for (kind, _), one in cloud.created.items():  # as an API describes them
        request = next(request for request in requests if one["name"].startswith(request.name))
        if kind == "tpu-vm":
            one["name"] = f"projects/p/locations/us-east5-b/nodes/{one['name']}"
            one["acceleratorType"] = "v5litepod-16"
        elif kind in ("instances", "managed"):
            one |= {"zone": "https://x/zones/us-east5-b", "machineType": "https://x/machineTypes/ct6e-standard-4t"}
            one |= {"scheduling": {"provisioningModel": "SPOT" if request.spot else "STANDARD"}}
        elif kind == "resource-policies":
            one["region"] = "https://x/regions/us-east5"
    return cloud


def test_everything_is_listed_with_its_cost_and_deleted():
    group = dataclasses.replace(BASE, name="run-2", topology="v6e:4x4", spot=True)
    cloud = project_with(dataclasses.replace(BASE, slices=2), group)
    things = owned("my-project", cloud)
    assert [(one.run, one.kind.name) for one in things] == [
        ("run-1", "queued resource"), ("run-1", "node"), ("run-1", "node"), ("run-2", "group"),
        *[("run-2", "instance")] * 4, ("run-2", "template"), ("run-2", "policy"),
    ]  # fmt: skip
    assert sum(one.chips for one in things) == 48 and {one.chip for one in things} == {None, "v5e", "v6e"}
    assert [one.where for one in things if one.kind.name in ("node", "policy")] == ["us-east5-b"] * 2 + ["us-east5"]
    assert [one.run for one in things if one.spot and one.chips] == ["run-2"] * 4
    cloud.created = {(kind, key): {**one, "name": key} for (kind, key), one in cloud.created.items()}
    delete_owned(owned("my-project", cloud, name="run-2"), "my-project", lambda seconds: None, cloud)
    assert {one.run for one in owned("my-project", cloud)} == {"run-1"}
    delete_owned(owned("my-project", cloud), "my-project", lambda seconds: None, cloud)
    assert not cloud.created


def test_things_of_others_are_not_listed():
    cloud = project_with(BASE)
    for one in cloud.created.values():
        one["labels"] = {"owner": "me"}
    assert owned("my-project", cloud) == []


def test_an_api_that_is_off_has_no_machines_and_another_refusal_is_told():
    def off(argv, **how):
        message = "ERROR: PERMISSION_DENIED: Cloud TPU API has not been used in project 1 before or it is disabled"
        return Done(1, "", message) if "tpus" in argv else Done(0, "[]", "")

    assert owned("my-project", off) == []
    with pytest.raises(PodError, match="project my-project: .*PERMISSION_DENIED.*role"):
        owned("my-project", lambda argv, **how: Done(1, "", "ERROR: PERMISSION_DENIED: compute.instances.list"))


def test_the_command(monkeypatch, capsys):
    cloud = project_with(dataclasses.replace(BASE, topology="v6e:2x2", spot=True))
    monkeypatch.setattr(command.subprocess, "run", as_subprocess(cloud))
    assert cli.main(["pod", "list", "--project=my-project"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("run-1: instance run-1-1 us-east5-b RUNNING") and "USD 4.32 an hour" in lines[0]
    assert lines[-1].endswith("USD 4.32 an hour")
    cloud.created.clear()
    assert cli.main(["pod", "list", "--project=my-project"]) == 0
    assert "nothing exists" in capsys.readouterr().out


def test_no_project_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(command.subprocess, "run", as_subprocess(lambda argv, **how: Done(0, "", "(unset)")))
    assert cli.main(["pod", "list"]) == 2
    assert "jaxft pod list: No project is named: give --project=PROJECT" in capsys.readouterr().err


def as_subprocess(run):
    """subprocess.run that a Run answers."""

    def subprocess_run(argv, **how):
        done = run(argv, stdin=how.get("input", b""))
        return command.subprocess.CompletedProcess(argv, done.code, done.out.encode(), done.err.encode())

    return subprocess_run
