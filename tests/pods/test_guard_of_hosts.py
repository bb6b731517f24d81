"""The watchdog and the upload of logs: a clock that the test sets, and loopback servers in place of Google's."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from google_on_loopback import COMPUTE, IAM, NODE, TOKEN, TPU, Google
from stub_slices import ROOT, StubSlices

from jaxft.pods.command import Done
from jaxft.pods.providers import slices_of
from jaxft.pods.request import Request

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts" / "worker"
START = 1_700_000_000


@pytest.fixture
def google() -> Iterator[Google]:
    google = Google()
    yield google
    google.close()


@pytest.fixture
def slices(google: Google, tmp_path: Path) -> Iterator[StubSlices]:
    env = {**google.environment, "JAXFT_CLOCK": str(tmp_path / "clock")}
    slices = StubSlices(tmp_path / "cloud", hosts=(1,), env=env)
    slices.create()
    pack = home(slices) / ROOT / "packs" / "abc"
    pack.mkdir(parents=True)
    (home(slices) / ROOT / "runs" / "r1").mkdir(parents=True)
    (home(slices) / ROOT / "runs" / "r1" / "pack").symlink_to(pack)
    clock(tmp_path, 0)
    yield slices
    slices.delete()


def clock(folder: Path, minutes: float) -> None:
    (folder / "new").write_text(str(int(START + 60 * minutes)))
    (folder / "new").rename(folder / "clock")


def home(slices: StubSlices) -> Path:
    return slices.home(slices.workers()[0])


def call(slices: StubSlices, script: str, *arguments: str) -> Done:
    return slices.ssh(slices.workers()[0], ["bash", str(SCRIPTS / script), *arguments], seconds=30)


def guard(slices: StubSlices, *more: str, minutes: float = 240) -> Done:
    until = f"--until={int(START + 60 * minutes)}"
    flags = more or ("--api=tpu", "--node=r1-1")
    return call(slices, "guard.sh", "r1", until, *flags)


def wait_for_delete(google: Google) -> None:
    for _ in range(100):
        if google.deletes():
            return
        time.sleep(0.05)
    raise AssertionError("no DELETE arrived")


def log(slices: StubSlices) -> str:
    return (home(slices) / ROOT / "runs" / "r1" / "guard" / "log").read_text()


def test_the_node_is_deleted_at_the_limit_although_a_run_is_alive(
    slices: StubSlices, google: Google, tmp_path: Path
) -> None:
    begun = guard(slices)
    assert begun.code == 0 and f"deletes {google.address}{NODE} at 2023-11-15T02:13:20Z" in begun.out
    call(slices, "start.sh", "r1", "1", "--", "sleep", "60")
    clock(tmp_path, 239)  # long after the last look, but the run is alive
    time.sleep(0.7)
    assert not google.deletes()
    clock(tmp_path, 240)
    wait_for_delete(google)
    # It is not asked for again once the API no longer knows the node.
    google.answers[("DELETE", NODE)] = 404
    for _ in range(100):
        if "answers with 404" in log(slices):
            break
        time.sleep(0.05)
    assert set(google.deletes()) == {NODE} and "the time limit is reached" in log(slices)


def test_the_node_is_deleted_when_nothing_has_started(slices: StubSlices, google: Google, tmp_path: Path) -> None:
    guard(slices)
    clock(tmp_path, 19)
    assert call(slices, "state.sh", "r1").code == 0  # somebody looks
    clock(tmp_path, 38)
    time.sleep(0.7)
    assert not google.deletes()
    clock(tmp_path, 39)
    wait_for_delete(google)
    assert "nothing of the run is alive, and nobody has looked at it for 20 minutes" in log(slices)


def test_the_node_is_deleted_when_a_run_ended_and_nobody_came(
    slices: StubSlices, google: Google, tmp_path: Path
) -> None:
    guard(slices, "--api=tpu", "--node=r1-1", "--idle_minutes=5")
    call(slices, "start.sh", "r1", "1", "--", "sh", "-c", "exit 3")
    exit_code = home(slices) / ROOT / "runs" / "r1" / "attempts" / "1" / "exit"
    while not exit_code.exists():
        time.sleep(0.02)
    clock(tmp_path, 4)
    time.sleep(0.7)
    assert not google.deletes()
    clock(tmp_path, 5)
    wait_for_delete(google)
    assert "attempt 1 ended with 3, and nobody has looked at it for 5 minutes" in log(slices)


def test_a_refused_delete_is_tried_again(slices: StubSlices, google: Google, tmp_path: Path) -> None:
    guard(slices)
    google.answers[("DELETE", NODE)] = 503
    clock(tmp_path, 240)
    while len(google.deletes()) < 3:
        time.sleep(0.02)
    assert "the API answers with 503" in log(slices)


def test_a_repeated_guard_watches_once_and_another_limit_replaces_it(slices: StubSlices) -> None:
    def pid() -> str:
        return (home(slices) / ROOT / "runs" / "r1" / "guard" / "pid").read_text()

    guard(slices)
    first = pid()
    again = guard(slices)
    assert again.code == 0 and "runs already" in again.out and pid() == first
    assert guard(slices, minutes=60).code == 0 and pid() != first
    assert json.loads(call(slices, "state.sh", "r1").out)["guard"] is True
    groups = {os.getpgid(one) for one in slices.processes(slices.workers()[0])}
    assert groups == {int(pid().split()[0])}


@pytest.mark.parametrize(
    ("flags", "path", "permission"),
    [
        (["--api=tpu", "--queued=q1"], f"{TPU}/queuedResources/q1", "tpu.queuedResources.delete"),
        (["--api=compute"], f"{COMPUTE}/instances/r1-1", "compute.instances.delete"),
        (
            ["--api=compute", "--group=g1"],
            f"{COMPUTE}/instanceGroupManagers/g1",
            "compute.instanceGroupManagers.delete",
        ),
    ],
)
def test_what_is_deleted(
    flags: list[str], path: str, permission: str, slices: StubSlices, google: Google, tmp_path: Path
) -> None:
    google.answers |= {("GET", path): 200, ("DELETE", path): 200}
    google.permissions = [permission]
    assert guard(slices, "--node=r1-1", *flags).code == 0
    clock(tmp_path, 240)
    wait_for_delete(google)
    assert google.deletes()[0] == path + ("?force=true" if "queued" in path else "")


@pytest.mark.parametrize(("option", "kind"), [("--node", "instances"), ("--group", "instanceGroupManagers")])
def test_all_slices_are_deleted_and_the_own_one_last(
    option: str, kind: str, slices: StubSlices, google: Google, tmp_path: Path
) -> None:
    own, other = (f"{COMPUTE}/{kind}/r1-1-{number}" for number in (1, 0))
    google.answers |= {("GET", own): 200, ("GET", other): 403, ("DELETE", own): 200, ("DELETE", other): 503}
    google.permissions = ["compute.instances.delete", "compute.instanceGroupManagers.delete"]
    nodes = [] if option == "--node" else ["--node=r1-1-1"]
    flags = ["--api=compute", *nodes, f"{option}=r1-1-1", f"{option}=r1-1-0"]
    may_not = guard(slices, *flags)
    assert may_not.code == 77 and f"{other} answers with 403" in may_not.err
    google.answers["GET", other] = 200
    assert guard(slices, *flags).code == 0
    clock(tmp_path, 240)
    while len(google.deletes()) < 2:
        time.sleep(0.02)
    assert set(google.deletes()) == {other}  # it waits, since nobody would be left to ask for the other again
    google.answers["DELETE", other] = 200
    while own not in google.deletes():
        time.sleep(0.02)
    assert google.deletes()[-2:] == [other, own]


def test_a_slice_that_cannot_be_deleted_does_not_keep_the_own_one(
    slices: StubSlices, google: Google, tmp_path: Path
) -> None:
    own, other = (f"{COMPUTE}/instances/r1-1-{number}" for number in (0, 1))
    google.answers |= {("DELETE", own): 200, ("DELETE", other): 403}
    slices.env = {**slices.env, "JAXFT_GUARD_PATIENCE": "2"}
    guard(slices, "--api=compute", "--node=r1-1-0", "--node=r1-1-1")
    clock(tmp_path, 240)
    while own not in google.deletes():
        time.sleep(0.02)
    assert google.deletes()[:4] == [other, other, other, own]


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"topology": "v6e:2x2"}, ["--api=compute", "--node=r1-1-1", "--node=r1-1-0", "--node=r1-1-2"]),
        (
            {"topology": "v6e:4x4"},
            ["--api=compute", *(f"--{kind}=r1-1-{number}" for kind in ("node", "group") for number in (1, 0, 2))],
        ),
        ({"topology": "v5e:2x2"}, ["--api=tpu", "--node=r1-1-1", "--queued=r1-1"]),
    ],
)
def test_a_watchdog_is_told_of_all_slices(options: dict[str, str], flags: list[str]) -> None:
    request = Request(name="r1", slices=3, zones=("us-east5-a",), to="gs://bucket/r1", max_hours=1.0, **options)  # type: ignore[arg-type]
    slices = slices_of(request, attempt=1, zone="us-east5-a", sleep=time.sleep)
    assert list(slices.guard_flags(1)) == [*flags, "--zone=us-east5-a"]


def no_account(google: Google) -> None:
    del google.metadata["instance/service-accounts/default/scopes"]


def few_scopes(google: Google) -> None:
    google.metadata["instance/service-accounts/default/scopes"] = "https://www.googleapis.com/auth/logging.write\n"


def no_role(google: Google) -> None:
    google.permissions = []


def no_read(google: Google) -> None:
    google.answers[("GET", NODE)] = 403


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (no_account, "has no service account: create it with one"),
        (few_scopes, "lack cloud-platform: create it with --scopes=cloud-platform"),
        (no_role, "lacks tpu.nodes.delete in project p1: give it a role with this permission"),
        (no_read, "answers with 403: check the name, zone and project"),
    ],
)
def test_a_guard_that_may_not_delete_says_so_at_the_start(
    fault, message: str, slices: StubSlices, google: Google
) -> None:
    fault(google)
    done = guard(slices)
    assert done.code == 77 and "MAY NOT delete the slices" in done.err and message in done.err


def test_a_project_without_the_iam_api_is_no_obstacle(slices: StubSlices, google: Google) -> None:
    google.answers[("POST", IAM)] = 403
    assert guard(slices).code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--api=tpu", "--node=n"], "--until is '', not seconds since 1970"),
        (["--until=1700000000", "--node=n"], "--api is '', not tpu or compute"),
        (["--until=1700000000", "--api=tpu"], "--node is missing"),
        (["--until=1700000000", "--api=tpu", "--node=n", "--idle_minutes=0"], "--idle_minutes is '0'"),
        (["--hours=1"], "usage: guard.sh RUN"),
    ],
)
def test_wrong_arguments_of_the_guard_are_refused(arguments: list[str], message: str, slices: StubSlices) -> None:
    done = call(slices, "guard.sh", "r1", *arguments)
    assert done.code == 2 and message in done.err


def test_the_token_is_in_no_command_line_and_no_file(slices: StubSlices, google: Google, tmp_path: Path) -> None:
    seen: set[bytes] = set()

    def look() -> None:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                seen.add((folder / "cmdline").read_bytes())
            except OSError:
                continue

    real = google.answer

    def slow(*arguments) -> tuple[int, str]:
        look()  # curl is alive while its request is answered
        return real(*arguments)

    google.answer = slow  # type: ignore[method-assign]
    guard(slices)
    clock(tmp_path, 240)
    wait_for_delete(google)
    assert any(b"curl" in one and NODE.encode() in one for one in seen)
    assert not [one for one in seen if TOKEN.encode() in one]
    assert not [path for path in home(slices).rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


@pytest.mark.parametrize("kind", ["bucket", "folder"])
def test_logs_outlive_the_host(kind: str, slices: StubSlices, google: Google, tmp_path: Path) -> None:
    to = "gs://b1/runs/r1" if kind == "bucket" else str(tmp_path / "mounted")
    wait = "until [ -e ~/go ]; do sleep 0.1; done"
    call(slices, "start.sh", "r1", "1", "--", "sh", "-c", f"echo one; {wait}; echo two; exit 5")
    assert call(slices, "upload_logs.sh", "r1", "3", f"--to={to}").code == 0
    assert "runs already" in call(slices, "upload_logs.sh", "r1", "3", f"--to={to}").out
    (home(slices) / "go").touch()

    def uploaded(name: str) -> bytes | None:
        path = tmp_path / "mounted" / name
        return (
            google.objects.get(f"b1/runs/r1/{name}")
            if kind == "bucket"
            else path.read_bytes()
            if path.exists()
            else None
        )

    for _ in range(100):
        if uploaded("logs/attempt-1/worker-3.exit"):
            break
        time.sleep(0.05)
    assert uploaded("logs/attempt-1/worker-3.exit") == b"5\n"
    assert uploaded("logs/attempt-1/worker-3.log") == b"one\ntwo\n"
    assert json.loads(call(slices, "state.sh", "r1").out)["upload_age"] < 10


def test_a_bucket_that_refuses_is_told_before_the_run(slices: StubSlices, google: Google) -> None:
    call(slices, "start.sh", "r1", "1", "--", "echo", "one")
    google.upload_status = 403
    done = call(slices, "upload_logs.sh", "r1", "0", "--to=gs://b1/r1")
    assert done.code == 2 and "the bucket answers with 403" in done.err and "storage.objects.create" in done.err


def test_logs_are_uploaded_after_a_failure(slices: StubSlices, google: Google) -> None:
    call(slices, "start.sh", "r1", "1", "--", "sh", "-c", "echo one; sleep 0.6; echo two")
    assert call(slices, "upload_logs.sh", "r1", "0", "--to=gs://b1/r1").code == 0
    google.upload_status = 503
    time.sleep(0.8)
    google.upload_status = 200
    for _ in range(100):
        if google.objects.get("b1/r1/logs/attempt-1/worker-0.log") == b"one\ntwo\n":
            return
        time.sleep(0.05)
    raise AssertionError("the end of the log was not uploaded")
