"""The verbs of `jaxft pod` over folders as hosts: the scripts are real, and training is played, so that a run takes
seconds.
"""

import dataclasses
import json
import shutil
import threading
import time
from pathlib import Path

import pytest
from bucket_server import Fault, serving
from fake_train import fake_environment
from google_on_loopback import Google
from stub_pod import CONFIG, LastingSlices

from jaxft.checkpoint import manifest
from jaxft.config import load
from jaxft.errors import ConfigError, PodError
from jaxft.pods import commands
from jaxft.pods.attempts.front import Outside
from jaxft.pods.attempts.launch import Records, folder_of
from jaxft.pods.command import Done
from jaxft.pods.dry_run import DryRun
from jaxft.pods.request import Request
from jaxft.pods.run import run
from jaxft.pods.slices import Phase, State

EMPTY_ZIP = b"PK\5\6" + bytes(18)
TOKEN = "hf_this-is-the-token-of-a-test"


class World:
    """A cloud of folders and the machine from which runs are led. env: of the hosts. lines: what was shown."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], **options) -> None:
        self.folder, self.patch, self.lines = folder, monkeypatch, []
        env = {"JAXFT_PYTHON_ENV": fake_environment(folder), **env}
        self.slices = LastingSlices(folder / "cloud", hosts=(1,), chips=4, env=env)
        self.request = Request(
            name="run-1", topology="v6e:2x2", zones=("us-east5-b",), to=str(folder / "my runs" / "one"), max_hours=4.0,
            skip_plan=True, keep_minutes=0.0, project="my-project", **options,
        )  # fmt: skip
        self.config = load("quickstart:smoke", CONFIG)
        self.home("laptop")
        # Training is played, so that the hosts need nothing of a wheel.
        monkeypatch.setattr("jaxft.pods.pack.archive.wheel", lambda: ("jaxft-0-py3-none-any.whl", EMPTY_ZIP))

    def home(self, name: str) -> None:
        """Another machine, with a home folder of its own."""
        (self.folder / name).mkdir(exist_ok=True)
        self.patch.setenv("HOME", str(self.folder / name))

    @property
    def outside(self) -> Outside:
        return Outside(
            say=self.say, slices_of=lambda request, **rest: self.slices, platform="cpu", poll_seconds=0.4,
            sleep=lambda seconds: time.sleep(min(seconds, 0.4)),
        )  # fmt: skip

    def say(self, text: str) -> None:
        self.lines.append(text)

    def lead(self, **options):
        request = dataclasses.replace(self.request, **options)
        return run(request, self.config, say=self.say, outside=self.outside)

    def verb(self, verb, **options):
        """What a verb returns; what it shows is in `lines` alone."""
        self.lines.clear()
        return verb("run-1", say=self.say, outside=self.outside, **options)

    def shown(self) -> str:
        return "\n".join(self.lines)

    @property
    def worker(self) -> Path:
        return self.slices.home(self.slices._all()[0])

    def run_folder(self) -> Path:
        return Path(self.request.to) / "run"

    def until(self, text: str) -> None:
        for _ in range(600):
            if any(text in line for line in self.lines):
                return
            time.sleep(0.05)
        raise AssertionError(f"{text!r} was not shown: {self.shown()}")


@pytest.fixture
def world(tmp_path, monkeypatch):
    world = World(tmp_path, monkeypatch, {})
    yield world
    world.slices.delete()


@pytest.fixture
def google():
    google = Google()
    yield google
    google.server.shutdown()
    google.server.server_close()


def saved(run_folder: Path) -> list[int]:
    return sorted(int(path.parent.name) for path in run_folder.glob(f"checkpoints/*/{manifest.NAME}"))


def test_a_run_to_a_folder_is_brought_home_and_every_verb_knows_it(world):
    summary = world.lead()
    assert summary["state"] == "done" and summary["step"] == 3 and not world.slices.alive
    assert saved(world.run_folder()) == [1, 2, 3] and (world.run_folder() / "summary.json").is_file()
    to = world.run_folder().parent
    assert "step 3/3" in (to / "logs" / "attempt-1" / "worker-0.log").read_text()
    record = folder_of("run-1") / "launch.json"
    assert (to / "launch.json").read_text() == record.read_text() and json.loads(record.read_text())["fetched"]

    assert world.verb(commands.status)["machines"] is None
    assert "run run-1: done" in world.shown() and "USD 0.00 an hour now" in world.shown()
    world.verb(commands.logs)
    assert "step 3/3  loss 1.0" in world.shown()
    assert world.verb(commands.fetch)["folder"] == str(world.run_folder()) and "is whole" in world.shown()
    assert world.verb(commands.stop)["state"] == "done"
    assert world.lead()["attempts"] == 1 and world.slices.incarnation == 1  # the same command again does nothing

    (world.run_folder() / "checkpoints" / "3" / "weights").write_text("other bytes")
    with pytest.raises(PodError, match="is not whole: checkpoints/3"):
        world.verb(commands.fetch)


def test_status_logs_and_stop_of_a_run_that_goes_on(world):
    world.slices.env |= {"FAKE_SECONDS": "0.7", "FAKE_STEPS": "40"}
    led: list[dict] = []
    thread = threading.Thread(target=lambda: led.append(world.lead()))
    thread.start()
    try:
        world.until("step 1/40")
        status = world.verb(commands.status)
        assert status["state"] == "open" and status["leader"] and status["hour_usd"] == 10.8
        (one,) = status["workers"]
        assert one["alive"] and one["chips"] == 4 and one["step"] >= 1 and one["problem"] is None
        assert "attempt 1, training" in world.shown() and "node 1 in us-east5-b: READY" in world.shown()
        followed: list[dict] = []
        follower = threading.Thread(target=lambda: followed.append(world.verb(commands.logs, follow=True)))
        follower.start()
        with pytest.raises(ConfigError, match="workers 0 to 0"):
            commands.logs("run-1", worker=1, say=world.say, outside=world.outside)
        stopped = commands.stop("run-1", say=world.say, outside=world.outside)
        follower.join(30)
    finally:
        thread.join(60)
    assert stopped["state"] == led[0]["state"] == "stopped" and followed
    assert "leads run run-1, and stops it" in world.shown() and "saved after SIGTERM" in world.shown()
    assert not world.slices.alive
    steps = saved(world.run_folder())
    assert steps and "exit codes 75" in world.shown()

    # The same command goes on, on new machines that get what there is of the run.
    world.slices.env |= {"FAKE_SECONDS": "0", "FAKE_STEPS": str(steps[-1] + 1)}
    world.lines.clear()
    summary = world.lead()
    assert summary["state"] == "done" and (summary["nodes"], summary["attempts"]) == (2, 2)
    assert f"begins after step {steps[-1]}" in world.lines and saved(world.run_folder()) == [*steps, steps[-1] + 1]


def shared(world, **options):
    to = world.folder / "filestore"
    world.request = dataclasses.replace(world.request, to=str(to), shared=True, **options)
    return to


def test_another_machine_takes_up_a_run_that_was_left(world):
    world.slices.env |= {"FAKE_SECONDS": "2"}
    to = shared(world)
    assert world.lead(detach=True)["state"] == "open" and world.slices.alive
    begun = json.loads((to / "launch.json").read_text())
    world.home("desktop")
    with pytest.raises(PodError, match=r"no record of a run 'run-1'.*the same `jaxft pod run` takes it up here"):
        world.verb(commands.status)
    world.lines.clear()
    summary = world.lead()
    assert f"takes up run run-1 from {to}/launch.json" in world.lines
    assert summary["state"] == "done" and (summary["nodes"], summary["attempts"]) == (1, 1)
    assert world.slices.events.count("create") == 1 and not world.slices.alive
    assert saved(to / "run") == [1, 2, 3]
    ended = json.loads((to / "launch.json").read_text())
    assert ended["created"] == begun["created"] and Records(folder_of("run-1")).read().state == "done"
    assert world.verb(commands.status)["state"] == "done"

    # With other inputs it is another run, of which the archive that it began with is not here.
    world.home("tablet")
    other = dataclasses.replace(world.config, seed=1)
    with pytest.raises(ConfigError, match="was begun with another config"):
        run(world.request, other, say=world.say, outside=world.outside)
    world.home("phone")
    world.patch.setattr("jaxft.pods.pack.archive.lock_of", lambda extras: "jax==1\n")
    with pytest.raises(PodError, match=r"is gone, which run run-1 began with.*another --name"):
        world.lead()


@pytest.fixture
def bucket(world, google):
    with serving() as server:
        world.slices.env |= {"STORAGE_EMULATOR_HOST": server.url, "JAXFT_METADATA": google.address}
        world.request = dataclasses.replace(world.request, to="gs://bucket/my runs/one/")
        yield server


def test_a_run_in_a_bucket(world, bucket, tmp_path):
    pytest.importorskip("gcsfs")
    assert world.lead()["step"] == 3
    names = bucket.names("bucket", "my runs/one/")
    assert "my runs/one/run/checkpoints/3/manifest.json" in names
    log = "my runs/one/logs/attempt-1/worker-0.log"
    assert "step 3/3" in bucket.read("bucket", log).decode()
    assert json.loads(bucket.read("bucket", "my runs/one/launch.json"))["state"] == "done"
    world.verb(commands.logs)  # its machine is deleted
    assert "step 3/3  loss 1.0" in world.shown()
    with pytest.raises(ConfigError, match="give the folder that it is brought to, --to=FOLDER"):
        world.verb(commands.fetch)
    here = str(tmp_path / "here it is")
    assert world.verb(commands.fetch, to=here)["folder"] == f"{here}/run" and "is whole" in world.shown()
    assert saved(Path(here) / "run") == [1, 2, 3]
    with pytest.raises(ConfigError, match="is there already: give another --to, or move it away"):
        world.verb(commands.fetch, to=here)
    bucket.delete("bucket", "my runs/one/run/checkpoints/2/weights")
    with pytest.raises(PodError, match="checkpoints/2"):
        world.verb(commands.fetch, to=str(tmp_path / "there"))
    shutil.rmtree(tmp_path / "laptop")  # a machine that is lost takes nothing with it
    world.home("laptop")
    assert world.lead()["state"] == "done" and world.slices.incarnation == 1


REFUSED = {
    "absent": ("gs://absent/run", lambda asked: None, "there is no bucket absent.*gcloud storage buckets create"),
    "forbidden": ("gs://bucket/x", lambda asked: Fault(status=403), "storage.objectUser"),
    "read alone": (
        "gs://bucket/x", lambda asked: Fault(status=403) if asked.method == "POST" else None, "cannot write gs://bucket/x"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_bucket_that_cannot_be_used_is_told_before_anything_is_created(world, bucket, kind):
    pytest.importorskip("gcsfs")
    to, rule, message = REFUSED[kind]
    with bucket.failing(rule), pytest.raises(PodError, match=message):
        world.lead(to=to)
    assert not world.slices.events and Records(folder_of("run-1")).read() is None


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_created(world, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(PodError, match="cannot be made on this machine.*another --to"):
        world.lead(to=str(tmp_path / "file" / "run"))
    assert not world.slices.events


def test_secrets_are_in_one_file_of_the_host_alone(world, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    to = shared(world, env=("HF_TOKEN",))
    calls: list[str] = []
    world.slices.breaks = lambda kind, worker, argv: calls.append(" ".join([kind, *argv]))
    world.slices.env |= {"JAXFT_UPLOAD_POLL": "0.2"}
    assert world.lead(detach=True)["state"] == "open"
    # While its machine is there: what was written anywhere, on the host, here and below --to.
    world.until("training runs")
    files = [path for path in world.folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert files == [world.worker / "jaxft-pod" / "runs" / "run-1" / "env"]
    assert files[0].stat().st_mode & 0o777 == 0o600
    world.lead()
    log = (to / "logs" / "attempt-1" / "worker-0.log").read_text()
    assert f"a token of {len(TOKEN)} characters, in no command line" in log
    assert not [text for text in [*calls, *world.lines] if TOKEN in text] and any("secrets.sh" in one for one in calls)
    world.slices.delete()
    everything = [path for path in world.folder.rglob("*") if path.is_file() and "cloud" not in path.parts]
    assert everything and not [path for path in everything if TOKEN.encode() in path.read_bytes()]


def test_the_front_starts_the_watchdog_and_the_upload_of_logs(world, google, tmp_path):
    clock = tmp_path / "clock"
    clock.write_text(str(int(time.time())))
    world.slices.env |= {
        "JAXFT_METADATA": google.address, "JAXFT_TPU_API": google.address, "JAXFT_IAM_API": google.address,
        "JAXFT_GUARD_POLL": "0.2", "JAXFT_UPLOAD_POLL": "0.2", "JAXFT_CLOCK": str(clock), "FAKE_SECONDS": "60",
    }  # fmt: skip
    world.slices.guard = ("--api=tpu", "--node=r1-1", "--zone=us-east5-a", "--project=p1")
    to = shared(world)
    world.lead(detach=True)
    assert not any("warning" in line for line in world.lines)
    assert not google.deletes()
    for _ in range(100):  # the front has left, and the log comes all the same
        if (log := to / "logs" / "attempt-1" / "worker-0.log").is_file() and "begins" in log.read_text():
            break
        time.sleep(0.1)
    else:
        raise AssertionError("no log was uploaded")
    clock.write_text(str(int(time.time() + 3600 * 3.9)))
    time.sleep(1)
    assert not google.deletes()  # the run is alive, and --max_hours is not over
    clock.write_text(str(int(time.time() + 3600 * 4.01)))
    for _ in range(100):
        if google.deletes():
            break
        time.sleep(0.1)
    assert google.deletes()[0] == "/v2/projects/p1/locations/us-east5-a/nodes/r1-1"


def test_a_watchdog_that_may_not_delete_is_told_and_the_run_goes_on(world, google):
    google.permissions.clear()
    world.slices.env |= {
        "JAXFT_METADATA": google.address, "JAXFT_TPU_API": google.address, "JAXFT_IAM_API": google.address,
    }  # fmt: skip
    world.slices.guard = ("--api=tpu", "--node=r1-1", "--zone=us-east5-a", "--project=p1")
    shared(world)
    assert world.lead()["state"] == "done"
    (warning,) = [line for line in world.lines if line.startswith("warning: no watchdog")]
    assert (
        "MAY NOT delete the slices" in warning and "tpu.nodes.delete" in warning and "jaxft pod delete run-1" in warning
    )


def test_delete_takes_what_has_the_label_and_the_record_says_so(world):
    shared(world)
    world.slices.env |= {"FAKE_SECONDS": "60"}
    world.lead(detach=True)
    paper = DryRun(world.request, lambda line: None, lambda argv: Done(0, "", ""))
    paper(["gcloud", "compute", "instances", "create", "run-1-1", "--labels=jaxft-run=run-1"])
    paper(["gcloud", "compute", "instances", "create", "other-1", "--labels=jaxft-run=other"])
    assert world.verb(commands.delete, run=paper)["deleted"] == 1
    assert [name for _, name in paper.created] == ["other-1"]
    assert "deletes instance run-1-1" in world.shown() and "nothing of run run-1 is left" in world.shown()
    launch = Records(folder_of("run-1")).read()
    assert launch.state == "deleted" and launch.node is None and Records(folder_of("run-1")).wish() is None
    assert world.verb(commands.delete, run=paper)["deleted"] == 0  # a second time
    with pytest.raises(PodError, match="nothing has the label of a run 'unknown'"):
        commands.delete("unknown", project="my-project", say=world.say, run=paper, outside=world.outside)
    # It is over: the same command goes on from what was saved, on new machines.
    world.slices.delete()
    world.slices.env |= {"FAKE_SECONDS": "0"}
    assert world.lead()["state"] == "done" and world.slices.incarnation == 2


def test_stop_without_a_process_that_leads(world):
    shared(world)
    world.slices.env |= {"FAKE_SECONDS": "0.5", "FAKE_STEPS": "1000"}
    world.lead(detach=True)
    while not (Path(world.request.to) / "run" / "metrics.jsonl").exists():  # from its first step on it answers signals
        time.sleep(0.05)
    assert world.verb(commands.stop)["state"] == "stopped"
    assert (
        not world.slices.alive
        and "saved after SIGTERM" in (Path(world.request.to) / "logs" / "attempt-1" / "worker-0.log").read_text()
    )


def test_fetch_while_the_machine_cannot_be_reached(world):
    launched = threading.Thread(target=lambda: world.lead())
    world.slices.env |= {"FAKE_SECONDS": "0.5", "FAKE_STEPS": "20"}
    launched.start()
    try:
        world.until("step 2/20")
        assert world.verb(commands.fetch)["state"] == "open"
        assert 2 in saved(world.run_folder())
        states, world.slices.states = world.slices.states, [State(Phase.CREATING, "STARTING")]
        with pytest.raises(PodError, match="cannot be reached now: give the same command again later"):
            commands.fetch("run-1", say=world.say, outside=world.outside)
        world.slices.states = states
        commands.stop("run-1", say=world.say, outside=world.outside)
    finally:
        launched.join(60)
