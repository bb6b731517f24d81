"""A run of two processes in a bucket, of which neither sees the disk of the other: whole, killed, resumed, refused."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bucket_server import Asked, BucketServer, Fault, serving
from test_processes import Group, assert_same, figures

from jaxft.errors import ExitCode

pytestmark = pytest.mark.slow  # two processes each, which compile

SETTINGS = {
    "eval.metric": None, "train.steps": 6, "train.accumulation_steps": 1, "train.eval_every": 3, "checkpoint.every": 2,
}  # fmt: skip
# Another mount namespace, in which the files of the other process are hidden.
ALONE = ("unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"')


@pytest.fixture(scope="module")
def server() -> Iterator[BucketServer]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The same run in a folder that both processes see."""
    folder = tmp_path_factory.mktemp("local") / "run"
    with Group(folder, cache, 2, 2, **SETTINGS) as group:
        group.finish()
    return folder


class Hosts:
    """Starts runs of two processes, each with temporary files that the other does not see."""

    def __init__(self, folder: Path, cache: Path | None) -> None:
        self.folder, self.cache = folder, cache
        own = [folder / "host-0", folder / "host-1"]
        for one in own:
            one.mkdir()
        if subprocess.run([*ALONE, own[0], "true"], capture_output=True).returncode:
            pytest.skip("no namespaces of mounts here")
        self.prefixes = {i: ["env", f"TMPDIR={own[i]}", *ALONE, str(own[1 - i])] for i in range(2)}

    def start(self, address: str, processes: int = 2, **settings: Any) -> Group:
        more = {**SETTINGS, "output_dir": address, **settings}
        return Group(self.folder / "run", self.cache, processes, 4 // processes, prefixes=self.prefixes, **more)

    def left(self) -> list[Path]:
        return [path for host in ("host-0", "host-1") for path in (self.folder / host).glob("jaxft-*")]


@pytest.fixture
def hosts(tmp_path: Path, cache: Path) -> Hosts:
    return Hosts(tmp_path, cache)


def names(server: BucketServer, run: str) -> set[str]:
    """The files of a run in the bucket, without those of checkpoints and event files."""
    all_of_it = {name.removeprefix(f"{run}/") for name in server.names("bucket", f"{run}/")}
    return {name for name in all_of_it if not name.startswith(("checkpoints/", "tensorboard/"))}


def fetched(server: BucketServer, run: str, folder: Path) -> Path:
    """A local copy of the files of a run in the bucket."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in names(server, run):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(server.read("bucket", f"{run}/{name}"))
    return folder


def assert_is_local(server: BucketServer, run: str, local: Path, folder: Path) -> None:
    """A run in the bucket has the files of the local one, with the same figures, and the same bits of its exports."""
    ours = fetched(server, run, folder)
    theirs = {path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()}
    assert names(server, run) == {n for n in theirs if not n.startswith(("checkpoints/", "tensorboard/"))}
    for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors", "base/model.safetensors"):
        assert (ours / name).read_bytes() == (local / name).read_bytes(), name
    assert figures(ours) == figures(local)
    summary = json.loads((ours / "summary.json").read_text())
    assert summary["output_dir"] == f"gs://bucket/{run}" and summary["steps"] == 6
    assert {key for key in summary if key.endswith("_checks")} == {"adapter_checks", "merged_checks"}


def test_the_run_is_that_of_a_folder(server: BucketServer, hosts: Hosts, local: Path, tmp_path: Path) -> None:
    before = len(server.requests)
    with hosts.start("gs://bucket/whole") as group:
        group.finish()
    assert_is_local(server, "whole", local, tmp_path / "whole")
    assert not hosts.left()
    read = [one.path for one in server.requests[before:] if one.method == "GET" and "alt=media" in one.path]
    assert any("adapter.jaxft.partial" in path for path in read)  # process 1 read the export before it had its name
    with hosts.start("gs://bucket/whole", **{"train.steps": 8}) as group:
        group.finish()
        assert "going on from step 6 of 8" in group.said(0)


def when(server: BucketServer, name: str, act: Callable[[], None]) -> Callable[[Asked], Fault | None]:
    """A rule by which something is done once, before the first write of an object whose name ends so."""
    left = [act]

    def rule(asked: Asked) -> Fault | None:
        if asked.method == "POST" and asked.name.endswith(name) and left:
            left.pop()()
        return None

    return rule


def killed_at(server: BucketServer, moment: str, group: Group) -> None:
    """All processes are killed before the first write of an object whose name ends so."""

    def kill() -> None:
        for member in group.members:
            member.kill()

    with server.failing(when(server, moment, kill)):
        assert set(group.codes()) == {-9}, group.said(0)


@pytest.mark.parametrize(
    ("moment", "victims", "step"),
    [("4.saving", (0, 1), 2), ("4.saving", (1,), 2), ("adapter.jaxft.partial/adapter_model.safetensors", (0,), 6)],
    ids=["save, both", "save, second", "export, first"],
)
def test_a_killed_run_goes_on_to_the_same_bits(
    moment: str, victims: tuple[int, ...], step: int, server: BucketServer, hosts: Hosts, local: Path, tmp_path: Path
) -> None:
    run = f"killed-{len(victims)}-{step}"
    with hosts.start(f"gs://bucket/{run}") as group:

        def kill() -> None:
            for index in victims:
                group.members[index].kill()

        with server.failing(when(server, moment, kill)):
            codes = group.codes()
        assert [codes[i] for i in victims] == [-9] * len(victims), group.said(0)
        for index in {0, 1} - set(victims):
            assert codes[index] == ExitCode.PEER_LOST, group.said(index)
    assert "summary.json" not in names(server, run)
    with hosts.start(f"gs://bucket/{run}") as group:
        group.finish()
        assert f"going on from step {step} of 6" in group.said(0)
    assert_is_local(server, run, local, tmp_path / "copy")


def test_another_start_finds_what_the_first_one_compiled(server: BucketServer, hosts: Hosts) -> None:
    hosts.cache = None

    def steps() -> set[str]:
        entries = {name for name in server.names("bucket", "kept/compiled/") if name.endswith("-cache")}
        return {name for name in entries if "train_step" in name}

    with hosts.start("gs://bucket/kept", **{"export.merged": False}) as group:
        killed_at(server, "4/manifest.json", group)
    kept, before = steps(), len(server.requests)
    assert len(kept) == 1
    with hosts.start("gs://bucket/kept", **{"export.merged": False}) as group:
        group.finish()
    assert steps() == kept
    read = [one.path for one in server.requests[before:] if one.method == "GET" and "alt=media" in one.path]
    assert sum(next(iter(kept)).rpartition("/")[2] in path for path in read) == 2  # once by each process


def test_a_run_goes_on_with_one_process_and_with_two(
    server: BucketServer, hosts: Hosts, local: Path, tmp_path: Path
) -> None:
    for processes, moment in ((2, "4.saving"), (1, "6.saving")):
        with hosts.start("gs://bucket/counts", processes) as group:
            killed_at(server, moment, group)
    with hosts.start("gs://bucket/counts", 2) as group:
        group.finish()
        assert "going on from step 4 of 6" in group.said(0)
    ours = fetched(server, "counts", tmp_path / "copy")
    assert_same(ours, local, "adapter/adapter_model.safetensors", "merged/model.safetensors")


def test_a_folder_of_something_else_is_refused_by_both(server: BucketServer, hosts: Hosts) -> None:
    server.write("bucket", "other/mine.txt", b"not a run")
    with hosts.start("gs://bucket/other") as group:
        assert group.codes() == [ExitCode.REFUSED] * 2
        for index in range(2):
            assert "output_dir gs://bucket/other is not empty and holds no run" in group.said(index)
    assert server.names("bucket", "other/") == ["other/mine.txt"]


def test_another_run_is_refused_by_both_by_its_address(server: BucketServer, hosts: Hosts) -> None:
    short = {"train.steps": 2, "export.merged": False}
    with hosts.start("gs://bucket/first", **short) as group:
        group.finish()
    before = names(server, "first")
    with hosts.start("gs://bucket/first", **short, **{"optim.learning_rate": 0.5}) as group:
        assert group.codes() == [ExitCode.REFUSED] * 2
        for index in range(2):
            assert "gs://bucket/first" in group.said(index) and "optim.learning_rate" in group.said(index)
            assert "jaxft-run-" not in group.said(index)
    assert names(server, "first") == before
