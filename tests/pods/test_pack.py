"""The archive for the hosts: what is in it, that the same inputs give the same bytes, and what is refused."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest

from jaxft.config import RunConfig, load, resolve
from jaxft.errors import ConfigError, PodError
from jaxft.pods.pack import archive, inputs, lock, pack, wheel
from jaxft.pods.pack.inputs import Inputs, imported_files

ROWS = '{"prompt": "1+1=", "completion": "2"}\n'
TOKEN = "hf_" + "x" * 30


@pytest.fixture(scope="module")
def jaxft_wheel() -> tuple[str, bytes]:
    return wheel.wheel()


@pytest.fixture(autouse=True)
def quick(jaxft_wheel: tuple[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """One wheel for all tests, and no token of the user who runs them."""
    monkeypatch.setattr(archive, "wheel", lambda: jaxft_wheel)
    monkeypatch.setattr(archive, "hub_token", dict)


def smoke(*overrides: str) -> RunConfig:
    return load("configs/quickstart.py:smoke", list(overrides))


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {one.name: tar.extractfile(one).read() for one in tar.getmembers()}  # type: ignore[union-attr]


def test_the_archive_holds_what_a_host_needs(tmp_path: Path) -> None:
    packed = pack(smoke(), tmp_path, secrets={})
    content = members(packed.path)
    assert packed.path.name == f"jaxft-{packed.digest}.tar.gz" and list(tmp_path.iterdir()) == [packed.path]
    config = resolve(json.loads(content["config.json"]))
    for path in (config.data.train, config.data.eval):
        assert (
            content[str(path)]
            == Path(getattr(smoke().data, "train" if path == config.data.train else "eval")).read_bytes()
        )
    assert f"{config.model.path}/tokenizer.json" in content
    assert content["worker/start.sh"].startswith(b"#!/usr/bin/env bash")
    assert content["extras.txt"] == b"gcs,tpu" and b"\njax==" in content["lock.txt"]
    assert any("data.train" in line for line in packed.contents)


def test_the_same_inputs_give_the_same_archive_at_other_times_and_paths(tmp_path: Path) -> None:
    digests = set()
    for name, time in (("a", 1e9), ("b", 1.5e9)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "rows.jsonl").write_text(ROWS)
        os.utime(folder / "rows.jsonl", (time, time))
        digests.add(pack(smoke(f"data.train={folder}/rows.jsonl"), folder, secrets={}).digest)
    assert len(digests) == 1
    (folder / "rows.jsonl").write_text(ROWS * 2)
    assert pack(smoke(f"data.train={folder}/rows.jsonl"), folder, secrets={}).digest not in digests


def test_the_wheel_installs_and_is_packed_again_by_its_record(jaxft_wheel: tuple[str, bytes], tmp_path: Path) -> None:
    name, content = jaxft_wheel
    (tmp_path / name).write_bytes(content)
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile", "--target", str(site)]
    subprocess.run([*command, str(tmp_path / name)], check=True, capture_output=True)
    assert (site / "jaxft" / "configs" / "quickstart.py").is_file()
    (site / "jaxft" / "stray.py").write_text("x = 1\n")  # it is in no RECORD
    # As it runs from there: nothing of the checkout is in the way.
    code = """import jaxft, sys, jaxft.pods.pack as p
from jaxft.pods.pack.wheel import wheel
sys.stderr.write(f"{jaxft.__file__} {p.scripts_folder()}")
sys.stdout.buffer.write(wheel()[1])"""
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, check=True)
    assert all(path.startswith(str(site / "jaxft")) for path in done.stderr.decode().split())
    files = [zipfile.ZipFile(io.BytesIO(one)).namelist() for one in (content, done.stdout)]
    assert files[0] == files[1]


def test_paths_of_every_kind_are_carried(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "set/train.jsonl", "set/.hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(ROWS)
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    carried = Inputs(
        smoke(
            f'data.train=["{tmp_path}/[ab].jsonl", "{tmp_path}/set", "hf://owner/name"]', "data.eval=gs://bucket/r.jsonl",
            f"data.chat_template={tmp_path}/chat.jinja", f"data.cache={tmp_path}",
        )
    )  # fmt: skip
    data = carried.values["data"]
    names = json.loads(data["train"])
    assert [Path(name).name for name in names] == ["a.jsonl", "b.jsonl", "set", "name"] and names[
        3
    ] == "hf://owner/name"
    assert data["eval"] == "gs://bucket/r.jsonl" and data["cache"] == "auto"
    assert carried.files[data["chat_template"]] == tmp_path / "chat.jinja"
    assert f"{names[2]}/train.jsonl" in carried.files and not any("hidden" in name for name in carried.files)


def test_a_reward_file_brings_what_it_imports(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("from .inner import f\n")
    (tmp_path / "package" / "inner.py").write_text("import json\ndef f(): pass\n")
    (tmp_path / "helper.py").write_text("import package\n")
    (tmp_path / "other.py").write_text("")
    (tmp_path / "rewards.py").write_text("import os, helper\ndef exact(completions, **_): return []\n")
    assert [path.name for path in imported_files(tmp_path / "rewards.py")] == ["helper.py", "__init__.py", "inner.py"]
    config = load(
        "configs/smollm2_135m_grpo.py:smoke", [f"rewards.functions={tmp_path}/rewards.py:exact=0.5,json_valid"]
    )
    carried = Inputs(config)
    functions = carried.values["rewards"]["functions"]
    assert re.fullmatch(r"inputs/\d+/rewards.py:exact=0.5,json_valid", functions)
    assert f"{Path(functions.split(':')[0]).parent}/package/inner.py" in carried.files


def test_the_base_of_a_peft_folder_is_carried(tmp_path: Path) -> None:
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    for folder in (adapter, base):
        folder.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    (base / "config.json").write_text("{}")
    carried = Inputs(smoke(f"model.path={adapter}", "model.random_init=False"))
    assert f"{carried.values['model']['base']}/config.json" in carried.files


def test_what_cannot_be_carried_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"data.train: there is no 'absent.jsonl' on this machine"):
        Inputs(smoke("data.train=absent.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"model.path: the folder .* is empty"):
        Inputs(smoke(f"model.path={tmp_path}/empty"))
    with pytest.raises(ConfigError, match=r"in a module of this machine's Python.* FILE.py:NAME"):
        Inputs(load("configs/smollm2_135m_grpo.py:smoke", ["rewards.functions=my.module:exact"]))
    monkeypatch.setattr(inputs, "LARGEST", 100_000)
    with pytest.raises(
        ConfigError, match=r"has 0.0 GB.*gcloud storage cp .*--config.data.train=gs://BUCKET/train.jsonl"
    ):
        Inputs(smoke())
    shutil.copy(smoke().data.train, tmp_path / "rows.jsonl")
    monkeypatch.setattr(inputs, "LARGEST", 250_000)
    with pytest.raises(ConfigError, match=r"(?s)the files that the config names have .*gs://BUCKET.*data.train: "):
        Inputs(smoke())


@pytest.mark.parametrize("where", ["rows", "config", "across two pieces"])
def test_a_secret_in_a_file_is_refused_and_not_printed(where: str, tmp_path: Path) -> None:
    before = "x" * (2**20 - 10) if where == "across two pieces" else ""
    (tmp_path / "rows.jsonl").write_text(before + (TOKEN if where != "config" else "") + ROWS)
    config = smoke(f"data.train={tmp_path}/rows.jsonl", "seed=1")
    if where == "config":
        config = smoke(f"data.train={tmp_path}/rows.jsonl", f"data.ignored_columns={TOKEN}")
    with pytest.raises(ConfigError, match=r"holds the value of HF_TOKEN.*--env=HF_TOKEN") as error:
        pack(config, tmp_path, secrets={"HF_TOKEN": TOKEN, "MODE": "prompt"})
    assert TOKEN not in str(error.value)
    assert not list(tmp_path.glob("*.tar.gz"))


def test_the_token_of_this_machine_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(archive, "hub_token", lambda: {"HF_TOKEN": TOKEN})
    (tmp_path / "rows.jsonl").write_text(ROWS + TOKEN)
    with pytest.raises(ConfigError, match="holds the value of HF_TOKEN"):
        pack(smoke(f"data.train={tmp_path}/rows.jsonl"), tmp_path, secrets={})


def test_the_lock_has_versions_that_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    here = lock._versions_here()
    monkeypatch.setattr(lock, "_is_python_of_hosts", lambda: True)
    pins = dict(line.split("==") for line in lock.lock_of(["tpu", "gcs"]).split())
    assert pins["jax"] == here["jax"] and pins["jaxlib"] == here["jaxlib"] and "jaxft" not in pins
    # jax names the libtpu for its hosts; another one, as jaxft[plan] may bring, is left out.
    monkeypatch.setattr(lock, "_versions_here", lambda: here | {"libtpu": "9.9.9"})
    assert "libtpu==" not in lock.lock_of(["tpu"])
    # Another Python has the versions of constraints/, and no libtpu of another jax.
    monkeypatch.setattr(lock, "_is_python_of_hosts", lambda: False)
    monkeypatch.setattr(lock, "_versions_of_constraints", lambda: {"jax": "0.12.9", "jaxlib": "0.12.9"})
    other = lock.lock_of(["tpu"])
    assert "jax==0.12.9\njaxlib==0.12.9\n" in other and "libtpu" not in other


def test_extras_follow_the_config() -> None:
    assert lock.extras_of(smoke("train.report_to=wandb", "data.train=hf://owner/name")) == (
        "datasets",
        "gcs",
        "tpu",
        "wandb",
    )
    with pytest.MonkeyPatch.context() as patch, pytest.raises(PodError, match="has no extra gcs, tpu.*pip install"):
        patch.setattr(lock.importlib.metadata, "metadata", lambda name: Message())
        lock.extras_of(smoke())


def test_another_version_than_pip_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxft.__version__", "9.9")
    with pytest.raises(PodError, match=r"pip knows jaxft .*, but 9.9 runs.*pip install --editable"):
        wheel.wheel()
