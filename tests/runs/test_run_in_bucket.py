"""A whole run whose folder is in a bucket that fails from time to time: it ends as a local one, and is read there."""

import io
import itertools
import json

import pytest
from bucket_server import Fault, serving
from rich.console import Console

import jaxft
from jaxft import cli
from jaxft.errors import BucketError, JaxftError
from jaxft.files.buckets import store
from jaxft.runs.train import train
from jaxft.training.log import TIMING_KEYS

pytestmark = pytest.mark.slow  # whole runs, a minute in all

SETTINGS = {"eval.metric": None, "checkpoint.every": 2, "export.merged": False}
RUN = "gs://bucket/runs/one"
PREFIX = "runs/one/"


@pytest.fixture(scope="module")
def server():
    with serving() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "FIRST_PAUSE", 0.01)
        yield server


def trained(folder, **settings) -> str:
    """Trains in a folder, and returns what the console shows."""
    out = io.StringIO()
    config = jaxft.get_config("configs/quickstart.py:smoke", {**SETTINGS, "output_dir": str(folder), **settings})
    train(config, console=Console(file=out, width=200))
    return out.getvalue()


@pytest.fixture(scope="module")
def run(server, tmp_path_factory):
    """The folder of a local run; the same run is in the bucket, of whose requests every seventh failed."""
    folder = tmp_path_factory.mktemp("local") / "one"
    trained(folder)
    faults = itertools.cycle([Fault(status=503), Fault(status=429), Fault(cut="before"), Fault(cut="middle")])
    count = itertools.count(1)
    with server.failing(
        lambda asked: None if "checkpoints" in asked.path + asked.name or next(count) % 7 else next(faults)
    ):
        trained(RUN)
    return folder


def rows(text: str) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING_KEYS} for line in text.splitlines()]


def test_the_files_are_those_of_a_local_run(run, server):
    here = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    there = {name.removeprefix(PREFIX) for name in server.names("bucket", PREFIX)}

    def small(names: set[str]) -> set[str]:
        return {name for name in names if not name.startswith(("checkpoints/", "tensorboard/"))}

    assert small(there) == small(here)
    assert f"{PREFIX}checkpoints/4/manifest.json" in server.names("bucket", PREFIX)
    for name in ("adapter/adapter_model.safetensors", "base/model.safetensors", "adapter/tokenizer.json", "data.json"):
        assert server.read("bucket", PREFIX + name) == (run / name).read_bytes()
    assert rows(server.read("bucket", f"{PREFIX}metrics.jsonl").decode()) == rows((run / "metrics.jsonl").read_text())
    config = json.loads(server.read("bucket", f"{PREFIX}config.json"))
    assert config | {"output_dir": str(run)} == json.loads((run / "config.json").read_text())
    assert json.loads(server.read("bucket", f"{PREFIX}summary.json"))["output_dir"] == RUN
    assert json.loads(server.read("bucket", f"{PREFIX}adapter/adapter_config.json"))["base_model_name_or_path"] == (
        f"{RUN}/base"
    )


def test_what_reads_runs_reads_it_in_the_bucket(run, server, tmp_path, capsys):
    before = server.names("bucket")
    assert cli.main(["runs", "gs://bucket/runs", "--json"]) == 0
    (state,) = json.loads(capsys.readouterr().out)["runs"]
    assert (state["folder"], state["state"], state["step"]) == (RUN, "finished", 4)
    assert cli.main(["verify", RUN, "--no_rows"]) == 0
    assert cli.main(["export", f"--run={RUN}", f"--to={tmp_path / 'adapter'}", "--format=adapter"]) == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / "adapter" / name).read_bytes() == server.read("bucket", f"{PREFIX}adapter/{name}")
    capsys.readouterr()
    assert cli.main(["eval", f"--run={RUN}", "--json"]) == 0
    loss = json.loads(capsys.readouterr().out)["eval_loss"]
    assert loss == pytest.approx(json.loads((run / "summary.json").read_text())["eval_loss"], rel=1e-6)
    assert server.names("bucket") == before  # readers write nothing


def test_the_same_command_goes_on_there(run, server):
    assert "going on from step 4 of 6" in trained(RUN, **{"train.steps": 6})
    assert json.loads(server.read("bucket", f"{PREFIX}summary.json"))["steps"] == 6
    steps = [row["step"] for row in rows(server.read("bucket", f"{PREFIX}metrics.jsonl").decode()) if "loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("gs://absent/run", "there is no bucket absent"),
        ("gs://bucket", "write gs://BUCKET/FOLDER"),
        ("s3://bucket/run", "is an address.*mount the store"),
    ],
)
def test_addresses_that_cannot_be_written_are_refused_before_the_work(server, address, message):
    with pytest.raises(JaxftError, match=message):
        trained(address)


def test_a_forbidden_bucket_is_refused_before_the_work(server):
    with server.failing(lambda asked: Fault(status=403)), pytest.raises(BucketError, match="roles/storage.objectUser"):
        trained("gs://bucket/other")
