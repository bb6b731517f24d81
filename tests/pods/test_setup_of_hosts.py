"""How a host is set up from the archive: safe to repeat, from uv or apt, and nothing half-installed is used."""

import json
import shutil
from pathlib import Path

import pytest
from stub_slices import BEFORE, BROKEN, MIDDLE, ROOT, StubSlices

from jaxft.config import load
from jaxft.pods.command import Done
from jaxft.pods.pack import Pack, archive, pack

# Each command writes its arguments to ~/calls, and fails if ~/fail-NAME exists. `uv venv` and `python -m venv` make an
# environment whose Python is the one of the test.
COMMAND = """#!/usr/bin/env bash
name="$(basename "$0")"
echo "$name $*" >> ~/calls
[[ ! -e ~/"fail-$name" ]] || {{ rm ~/"fail-$name"; echo "$name: no network" >&2; exit 7; }}
if [[ "$name $*" == "uv venv"* || "$*" == "-m venv "* ]]; then
  mkdir -p "${{@: -1}}/bin" && printf '#!/bin/sh\\nexec {python} "$@"\\n' > "${{@: -1}}/bin/python"
  chmod +x "${{@: -1}}/bin/python"
fi
"""
UTILITIES = """awk basename bash cat chmod cp curl cut date df dirname env find flock gzip head iconv ln mkdir mv ps
readlink rm sed setsid sha256sum sleep sort stat tail tar touch tr"""
FAKE_PYTHON = (
    '#!/bin/sh\necho "python $*" >> ~/calls\ncase "$*" in *jaxft.cli*) echo "jaxft 0.1.0";; *) echo "jax==1";; esac\n'
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archive, "hub_token", dict)
        return pack(load("configs/quickstart.py:smoke"), tmp_path_factory.mktemp("pack"), secrets={})


def deliver(slices: StubSlices, packed: Pack) -> Done:
    """As `jaxft pod run` brings the archive to a host."""
    (worker,) = slices.workers()
    target = f"{ROOT}/{packed.path.name}"
    for done in (
        slices.ssh(worker, ["mkdir", "-p", ROOT]),
        slices.copy(worker, packed.path, target),
        slices.ssh(worker, ["tar", "-xzf", target, "-C", ROOT, "worker"]),
    ):
        if done.code:
            return done
    return slices.ssh(worker, ["bash", f"{ROOT}/worker/setup.sh", "r1", target], seconds=60)


def test_a_host_runs_the_jaxft_of_the_archive(packed: Pack, tmp_path: Path) -> None:
    slices = StubSlices(tmp_path, hosts=(1,))
    slices.create()
    first = deliver(slices, packed)
    assert first.code == 0 and f"run r1 uses {packed.digest}: jaxft 0.1.0" in first.out, first
    again = deliver(slices, packed)
    assert again.code == 0 and "is installed already" in again.out
    (worker,) = slices.workers()
    code = "import jaxft, json; print(jaxft.__file__)"
    done = slices.ssh(worker, [f"{ROOT}/runs/r1/pack/bin/python", "-c", code])
    assert done.out.startswith(f"{slices.home(worker)}/{ROOT}/packs/{packed.digest}/site/jaxft/")
    state = json.loads(slices.ssh(worker, ["bash", f"{ROOT}/worker/state.sh", "r1"]).out)
    assert state["pack"] == packed.digest and len(state["environment"]) == 64


@pytest.fixture
def bare(tmp_path: Path) -> StubSlices:
    """A host without an environment, whose installers only note what they are called with."""
    home = tmp_path / "cloud" / "1" / "worker-0"
    tools = home / "tools"
    slices = StubSlices(tmp_path / "cloud", hosts=(1,), env={"JAXFT_PYTHON_ENV": None, "PATH": str(tools)})
    slices.create()
    tools.mkdir()
    for name in UTILITIES.split():  # and no other Python or installer of this machine
        (tools / name).symlink_to(shutil.which(name) or name)
    (home / "fake_python").write_text(FAKE_PYTHON)
    (home / "fake_python").chmod(0o755)
    for name in ("uv", "apt-get", "add-apt-repository", "python3.12", "python3", "sudo"):
        (tools / name).write_text(COMMAND.format(python=home / "fake_python"))
        (tools / name).chmod(0o755)
    return slices


def calls(slices: StubSlices) -> list[str]:
    (worker,) = slices.workers()
    return (slices.home(worker) / "calls").read_text().splitlines()


def test_uv_installs_the_wheel_with_the_locked_versions(bare: StubSlices, packed: Pack) -> None:
    done = deliver(bare, packed)
    assert done.code == 0, done
    (worker,) = bare.workers()
    pod = bare.home(worker) / ROOT
    venv, inner = pod / "venvs" / packed.digest, pod / "packs" / packed.digest
    made, installed = calls(bare)[:2]
    assert made == f"uv venv --quiet --python 3.12 {venv}"
    assert installed == (
        f"uv pip install --quiet --python {venv}/bin/python --constraint {inner}/lock.txt "
        f"jaxft[gcs,tpu] @ file://{inner}/wheel/jaxft-0.1.0-py3-none-any.whl"
    )
    assert (pod / "runs" / "r1" / "pack").resolve() == inner


def test_without_uv_python_comes_from_apt_which_waits_for_its_lock(bare: StubSlices, packed: Pack) -> None:
    (worker,) = bare.workers()
    tools = bare.home(worker) / "tools"
    (tools / "uv").unlink()
    (bare.home(worker) / "fail-python3").touch()  # pip cannot bring uv
    (tools / "python3.12").rename(tools / "later")
    (tools / "apt-get").write_text(
        (tools / "apt-get").read_text() + f'[[ "$*" != *install* ]] || mv {tools}/later {tools}/python3.12\n'
    )
    done = deliver(bare, packed)
    assert done.code == 0 and "uv cannot be had" in done.out, done
    apt = [line for line in calls(bare) if line.startswith("apt-get")]
    assert apt and all("DPkg::Lock::Timeout=900" in line for line in apt)
    assert any(line.startswith("python -m pip install --quiet --constraint") for line in calls(bare))


def test_a_setup_that_failed_is_done_again(bare: StubSlices, packed: Pack) -> None:
    (worker,) = bare.workers()
    (bare.home(worker) / "fail-uv").touch()
    failed = deliver(bare, packed)
    assert failed.code == 7 and "uv: no network" in failed.err
    assert not (bare.home(worker) / ROOT / "runs" / "r1" / "pack").exists()
    assert deliver(bare, packed).code == 0


@pytest.mark.parametrize("kind", ["ssh", "copy"])
@pytest.mark.parametrize("how", [BEFORE, MIDDLE])
def test_a_broken_connection_leaves_nothing_half_done(kind: str, how: str, bare: StubSlices, packed: Pack) -> None:
    breaks = iter([how])
    bare.breaks = lambda one, worker, argv: next(breaks, None) if one == kind else None
    assert deliver(bare, packed) == BROKEN
    assert deliver(bare, packed).code == 0


def test_an_archive_that_is_not_whole_is_refused(bare: StubSlices, packed: Pack) -> None:
    (worker,) = bare.workers()
    deliver(bare, packed)
    cut = bare.home(worker) / "jaxft-abc.tar.gz"
    cut.write_bytes(packed.path.read_bytes()[:-9])
    done = bare.ssh(worker, ["bash", f"{ROOT}/worker/setup.sh", "r2", "jaxft-abc.tar.gz"])
    assert done.code == 2 and "is not whole: its SHA-256 is not the one in its name. Copy it again." in done.err
    gone = bare.ssh(worker, ["bash", f"{ROOT}/worker/setup.sh", "r2", "absent.tar.gz"])
    assert gone.code == 2 and "there is no archive absent.tar.gz: copy it again" in gone.err
