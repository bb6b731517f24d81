"""A run of several processes is the run of one: same rows, losses and exports; and all end together."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from heard_signals import HEARING
from rich.console import Console
from safetensors.numpy import load_file

from jaxft.assets import ASSETS
from jaxft.config import load
from jaxft.errors import ConfigError, ExitCode
from jaxft.runs import folder as files
from jaxft.runs.quickstart import quickstart
from jaxft.runs.train import train
from jaxft.training.log import TIMING_KEYS

HEARTBEAT_SECONDS = 10
SMOKE_ROWS = ASSETS / "smoke"
STUCK_SECONDS = 300  # without a tenth of a second of work
SMOKE = {
    "adapter.dropout": 0.1, "train.log_every": 1, "train.batch_size": 16, "train.accumulation_steps": 2,
    "data.max_length": 384,
}  # fmt: skip
GLOO_WORDS = set("Gloo Rank is connected to peer ranks Expected number of".split())
# Long enough to be stopped in, and divisible over 16 devices.
LONG = SMOKE | {
    "train.steps": 40, "train.accumulation_steps": 1, "train.eval_every": 20, "eval.metric": None,
    "export.merged": False, "checkpoint.every": None,
}  # fmt: skip

ONLINE = {
    "method.name": "grpo", "adapter.dropout": 0.0, "eval.metric": None, "export.merged": False,
    "data.train": SMOKE_ROWS / "prompts.jsonl", "data.eval": SMOKE_ROWS / "prompts_heldout.jsonl",
    "rollout.num_generations": 4, "rollout.max_completion_length": 12, "rewards.workers": 1,
}  # fmt: skip


class Group:
    """`jaxft train` in so many processes of so many fake devices each; ended with the block."""

    def __init__(
        self, folder: Path, cache: Path | None, processes: int, devices: int, own: Any = None, prefixes: Any = None,
        **overrides: Any,
    ):  # fmt: skip
        settings = {"output_dir": folder, **SMOKE, **overrides}
        command = [
            *HEARING, sys.executable, "-m", "jaxft.cli", "train", "--config=configs/quickstart.py:smoke",
            *(f"--config.{key}={value}" for key, value in settings.items()),
        ]  # fmt: skip
        env = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        }
        if cache is not None:  # else the run keeps what it compiles in its own folder
            env |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
        self.folder, self.members = folder, []
        address = f"--coordinator=127.0.0.1:{free_port()}"
        for index in range(processes):
            place = [address, f"--num_processes={processes}", f"--process_id={index}"] if processes > 1 else []
            place += (own or {}).get(index, [])
            place += [f"--heartbeat_seconds={HEARTBEAT_SECONDS}"]
            output = folder.with_name(f"{folder.name}-{index}.txt").open("w")
            whole = [*(prefixes or {}).get(index, []), *command, *place]
            self.members.append(
                subprocess.Popen(whole, cwd=Path(__file__).parents[2], env=env, stdout=output, stderr=subprocess.STDOUT)
            )

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        for member in self.members:
            member.kill()
            member.wait()

    def said(self, index: int) -> str:
        return self.folder.with_name(f"{self.folder.name}-{index}.txt").read_text()

    def wait_for(self, done: Callable[[], bool]) -> None:
        """Returns when something is so, however long a busy machine takes; a group that no longer works fails."""
        worked, since = self._work(), time.monotonic()
        while not done():
            time.sleep(0.05)
            if time.monotonic() - since > STUCK_SECONDS:
                before, worked, since = worked, self._work(), time.monotonic()
                assert abs(worked - before) > 0.1, "\n".join(self.said(i)[-3000:] for i in range(len(self.members)))

    def _work(self) -> float:
        """CPU seconds of all processes so far; one that has ended counts as one more."""
        total = 0.0
        for member in self.members:
            try:
                fields = Path(f"/proc/{member.pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                fields = []
            # A zombie's state is Z; utime and stime are the 12th and 13th after the name.
            ended = not fields or fields[0] == "Z"
            total += 1.0 if ended else sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
        return total

    def code(self, index: int) -> int:
        """Exit code of one process, when it has ended."""
        self.wait_for(lambda: self.members[index].poll() is not None)
        return self.members[index].returncode

    def codes(self) -> list[int]:
        """Exit codes, when all have ended."""
        return [self.code(index) for index in range(len(self.members))]

    def finish(self) -> None:
        codes = self.codes()
        assert codes == [0] * len(codes), "\n".join(self.said(i)[-3000:] for i in range(len(codes)))

    def wait_for_step(self, step: int) -> None:
        """Returns when metrics.jsonl has reached a step; a process that ends before is a failure."""
        metrics = self.folder / "metrics.jsonl"

        def reached() -> bool:
            ended = [i for i, member in enumerate(self.members) if member.poll() is not None]
            assert not ended, self.said(ended[0])
            return metrics.exists() and f'"step": {step},' in metrics.read_text()

        self.wait_for(reached)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def figures(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what a clock wrote."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMING_KEYS} for row in rows]


def assert_same(folder: Path, reference: Path, *exports: str) -> None:
    """The same figures and exported arrays within 1e-5, and exactly the same rows at every step."""
    found, expected = figures(folder), figures(reference)
    assert [set(row) for row in found] == [set(row) for row in expected]
    for row, other in zip(found, expected, strict=True):
        for key in ("step", "num_tokens", "trained_tokens", "epoch"):  # a function of the data's order
            assert row.get(key) == other.get(key)
        np.testing.assert_allclose(
            [row[k] for k in sorted(row)], [other[k] for k in sorted(other)], rtol=1e-5, atol=1e-5
        )
    for name in exports:
        ours, theirs = load_file(folder / name), load_file(reference / name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-5, atol=1e-5, err_msg=key)


ADAPTER, MERGED = "adapter/adapter_model.safetensors", "merged/model.safetensors"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


def test_two_processes_train_as_one(tmp_path: Path, cache: Path) -> None:
    settings = SMOKE | {"eval.metric": None, "export.merged": False, "train.steps": 3}
    with Group(tmp_path / "two", cache, 2, 4, **settings) as group:
        config = load("configs/quickstart.py:smoke", [f"{k}={v}" for k, v in settings.items()])
        whole = train(dataclasses.replace(config, output_dir=str(tmp_path / "one")), console=Console(quiet=True))
        group.finish()
        # Gloo's threads write over each other, so its sentence may come in pieces; any other word is ours.
        assert set(re.findall(r"[^\W\d]+", group.said(1))) <= GLOO_WORDS
    assert_same(tmp_path / "two", tmp_path / "one", ADAPTER)
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary.keys() == whole.keys() and summary["steps"] == 3
    assert sorted(os.listdir(tmp_path / "two")) == sorted(os.listdir(tmp_path / "one"))


@pytest.mark.slow
def test_two_processes_score_and_export_as_one(tmp_path: Path, cache: Path) -> None:
    whole, folder = tmp_path / "one", tmp_path / "two"
    with Group(whole, cache, 1, 4) as group:
        group.finish()
    with Group(folder, cache, 2, 2) as group:
        group.finish()
    assert_same(folder, whole, ADAPTER, MERGED)
    scores, expected = (json.loads((run / "scores.json").read_text()) for run in (folder, whole))
    assert scores["base_answers"] == expected["base_answers"] and scores["tuned"] == expected["tuned"]
    assert len(list((folder / "tensorboard").iterdir())) == len(list((whole / "tensorboard").iterdir()))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "orpo", "simpo", "reward"])
def test_two_processes_learn_from_pairs_as_one(method: str, tmp_path: Path, cache: Path) -> None:
    more = {
        "method.name": method, "adapter.dropout": 0.0, "eval.metric": None, "export.merged": False,
        "data.train": SMOKE_ROWS / "pairs.jsonl", "data.eval": SMOKE_ROWS / "pairs_heldout.jsonl",
    }  # fmt: skip
    with Group(tmp_path / "one", cache, 1, 4, **more) as group:
        group.finish()
    with Group(tmp_path / "two", cache, 2, 2, **more) as group:
        group.finish()
    assert_same(tmp_path / "two", tmp_path / "one", ADAPTER)


@pytest.mark.slow
@pytest.mark.parametrize(
    "own",
    [{"method.name": "grpo", "method.grpo.beta": 0.05}, {"method.name": "ppo", "method.ppo.kl_target": 1.0}],
    ids=["grpo", "ppo"],
)
def test_two_processes_learn_from_rewards_as_one(tmp_path: Path, cache: Path, own: dict[str, object]) -> None:
    """They sample the same answers, each scores a half of them, and both have all rewards."""
    rewards = Path(__file__).parents[1] / "rollouts" / "reward_cases.py"
    assert_same_answers(tmp_path, cache, ONLINE | {"rewards.functions": f"{rewards}:odd"} | own)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["adapter", "whole"])
def test_two_processes_learn_from_a_reward_model_as_one(tmp_path: Path, cache: Path, form: str) -> None:
    """An adapter on the base that both train, which they hold once, or a whole model, split over all devices."""
    judge = tmp_path / "judge"
    pairs = {
        "method.name": "reward", "adapter.dropout": 0.0, "eval.metric": None, "export.merged": form == "whole",
        "data.train": SMOKE_ROWS / "pairs.jsonl", "data.eval": None, "train.steps": 2,
    }  # fmt: skip
    with Group(judge, cache, 1, 1, **pairs) as group:
        group.finish()
    model = judge / ("adapter" if form == "adapter" else "merged")
    more = ONLINE | {
        "model.path": judge / "base", "model.random_init": False, "rewards.model": model,
        "rewards.missing_eos_penalty": 0.25,
    }  # fmt: skip
    rewards = assert_same_answers(tmp_path, cache, more)
    assert {name for one in rewards for name in one} == {"reward_model"}
    assert len({one["reward_model"] for one in rewards}) > 16


@pytest.mark.slow
def test_two_processes_learn_in_an_environment_as_one(tmp_path: Path, cache: Path) -> None:
    """Each keeps a half of the conversations and tells the other their replies."""
    start = {"adapter.kind": "none", "eval.metric": None, "train.steps": 1, "data.eval": None}
    with Group(tmp_path / "model", cache, 1, 1, **start) as group:
        group.finish()
    base = tmp_path / "model" / "model"
    # Every seventh token ends a turn, so that a random model has several turns.
    vocab = json.loads((base / "config.json").read_text())["vocab_size"]
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(3, vocab - 8, 7))}))
    cases = Path(__file__).parents[1] / "rollouts" / "environments" / "environment_cases.py"
    more = ONLINE | {
        "model.path": base, "model.random_init": False, "rollout.environment": f"{cases}:Lengths",
        "rollout.max_turns": 3, "rollout.max_completion_length": 64,
    }  # fmt: skip
    rewards = assert_same_answers(tmp_path, cache, more)
    assert len({one["environment"] for one in rewards}) > 4
    assert max(row["environment/turns"] for row in figures(tmp_path / "two") if "environment/turns" in row) > 1.5


def assert_same_answers(folder: Path, cache: Path, more: dict[str, object]) -> list[dict[str, float]]:
    """The rewards by name of every answer, which two processes of two devices and one of four sample alike."""
    with Group(folder / "one", cache, 1, 4, **more) as group:
        group.finish()
    with Group(folder / "two", cache, 2, 2, **more) as group:
        group.finish()
    assert_same(folder / "two", folder / "one", ADAPTER)
    ours, theirs = ((folder / name / "completions.jsonl").read_text().splitlines() for name in ("two", "one"))
    assert len(ours) == len(theirs) == 4 * 16
    rewards = []
    for line, other in zip(map(json.loads, ours), map(json.loads, theirs), strict=True):
        assert line["completion"] == other["completion"]
        assert line["rewards"] == pytest.approx(other["rewards"], rel=1e-4, abs=1e-4)
        rewards.append(line["rewards"])
    return rewards


@pytest.mark.slow
def test_two_processes_cache_a_reference_as_one(tmp_path: Path, cache: Path) -> None:
    more = {
        "method.name": "kto", "method.kto.reference": "cached", "adapter.dropout": 0.0, "eval.metric": None,
        "export.merged": False, "data.train": SMOKE_ROWS / "labelled.jsonl",
        "data.eval": SMOKE_ROWS / "labelled_heldout.jsonl",
    }  # fmt: skip
    with Group(tmp_path / "one", cache, 1, 4, **more) as group:
        group.finish()
    with Group(tmp_path / "two", cache, 2, 2, **more) as group:
        group.finish()
    assert_same(tmp_path / "two", tmp_path / "one", ADAPTER)
    one, two = (np.load(tmp_path / name / "reference.npz") for name in ("one", "two"))
    ours, theirs = (
        {part: file[key] for part, key in json.loads(str(file["hashes"])).items()} for file in (two, one)
    )  # the hashes differ, since the drawn weights of either run have times of their own
    assert set(ours) == {"train", "held out"} and len(ours["train"]) == 48
    for part, values in theirs.items():
        np.testing.assert_allclose(ours[part], values, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("count", [None, 8], ids=["live", "cached"])
def test_two_processes_distil_a_teacher_as_one(count: int | None, tmp_path: Path, cache: Path) -> None:
    more = {
        "method.name": "distill", "method.distill.teacher": SMOKE_ROWS,
        "method.distill.teacher_random_init": True, "method.distill.cache_top_k": count, "eval.metric": None,
        "export.merged": False,
    }  # fmt: skip
    with Group(tmp_path / "one", cache, 1, 4, **more) as group:
        group.finish()
    with Group(tmp_path / "two", cache, 2, 2, **more) as group:
        group.finish()
    assert_same(tmp_path / "two", tmp_path / "one", ADAPTER)
    ours, theirs = (sorted((tmp_path / name).glob("teacher/*/logps.npy")) for name in ("two", "one"))
    assert [path.parent.name for path in ours] == [path.parent.name for path in theirs]
    assert len(ours) == (0 if count is None else 2)
    for path, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.load(path), np.load(other), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"mesh.fsdp": 2, "mesh.context": 4}, {"mesh.tensor": 2, "mesh.fsdp": 4}])
def test_four_processes_on_other_meshes_train_as_one(mesh: dict[str, int], tmp_path: Path, cache: Path) -> None:
    more = mesh | {"adapter.kind": "none", "eval.metric": None}
    with Group(tmp_path / "one", cache, 1, 8, **more) as group:
        group.finish()
    with Group(tmp_path / "four", cache, 4, 2, **more) as group:
        group.finish()
    assert_same(tmp_path / "four", tmp_path / "one", "model/model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_with_a_word(victim: int, tmp_path: Path, cache: Path) -> None:
    with Group(tmp_path / "run", cache, 2, 2, **LONG | {"train.steps": 2000}) as group:
        group.wait_for_step(2)
        group.members[victim].kill()
        other = 1 - victim
        assert group.code(other) == ExitCode.PEER_LOST, group.said(other)
        assert f"jaxft train: process {other} of 2" in group.said(other)
        assert f"because process {victim} (on " in group.said(other) and "is gone" in group.said(other)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_an_interrupted_process_ends_the_others_with_a_word(victim: int, tmp_path: Path, cache: Path) -> None:
    """Also with a save under way, for which it does not wait with the others."""
    more = LONG | {"train.steps": 2000, "checkpoint.every": 2}
    with Group(tmp_path / "run", cache, 2, 2, **more) as group:
        group.wait_for_step(5)
        group.members[victim].send_signal(signal.SIGINT)
        assert group.codes() == [ExitCode.INTERRUPTED if i == victim else ExitCode.PEER_LOST for i in range(2)]
        assert f"because process {victim} was interrupted" in group.said(1 - victim)


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "codes"), [(0, [2, 2]), (1, [69, 2])])
def test_a_process_that_fails_tells_the_others_why(victim: int, codes: list[int], tmp_path: Path, cache: Path) -> None:
    """One of them sees no data, as where a disk is not mounted. What process 0 refuses, all refuse with its words."""
    absent = {victim: ["--config.data.train=absent.jsonl"]}
    with Group(tmp_path / "run", cache, 2, 2, own=absent, **LONG) as group:
        assert group.codes() == codes
    assert "no data file 'absent.jsonl'" in group.said(0) and "no data file 'absent.jsonl'" in group.said(1)
    if victim == 1:
        assert "of 2 stops, because process 1 did: DataError: " in group.said(0)


@pytest.mark.slow
def test_processes_with_other_settings_are_refused_by_all(tmp_path: Path, cache: Path) -> None:
    """Before the first step, in whichever process they differ; also where a sound run would be resumed."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join((ASSETS / "quickstart" / "train.jsonl").read_text().splitlines(keepends=True)[::-1]))
    own = {
        0: ["--config.train.steps=20", f"--config.data.train={rows}"],
        1: ["--config.optim.learning_rate=0.5", "--config.seed=7", "--config.checkpoint.every=7"],
    }
    with Group(tmp_path / "run", cache, 2, 2, own=own, **LONG) as group:
        assert group.codes() == [ExitCode.REFUSED] * 2
    for index in range(2):
        assert "\n  train.steps: 20 in process 0, 40 in process 1\n" in group.said(index)
        assert "\n  optim.learning_rate: " in group.said(index) and "\n  seed: 0 in process 0, 7" in group.said(index)
        assert "checkpoint.every: None in process 0, 7 in process 1" in group.said(index)
    with Group(tmp_path / "run", cache, 2, 2, own={0: own[0][1:]}, **LONG) as group:
        assert group.codes() == [ExitCode.REFUSED] * 2
    assert all("\n  data.train: " in group.said(index) for index in range(2))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_all_refuse_is_refused_by_all(tmp_path: Path, cache: Path) -> None:
    with Group(tmp_path / "run", cache, 2, 2, **{"train.batch_size": 6}) as group:
        assert group.codes() == [ExitCode.REFUSED] * 2
    assert all("rows are not divisible by 4 devices" in group.said(index) for index in range(2))


@pytest.mark.slow
def test_what_process_0_refuses_is_refused_by_all(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("not a run")
    with Group(tmp_path / "run", cache, 2, 2) as group:
        assert group.codes() == [ExitCode.REFUSED] * 2
    assert all("is not empty and holds no run" in group.said(index) for index in range(2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [((2, 2), [(1, 2), (4, 2)]), ((1, 8), [(1, 4), (1, 16)])], ids=["processes", "devices"]
)
def test_a_run_goes_on_with_other_counts(
    before: tuple[int, int], after: list[tuple[int, int]], tmp_path: Path, cache: Path
) -> None:
    with Group(tmp_path / "whole", cache, 1, 8, **LONG) as group:
        group.finish()
    with Group(tmp_path / "first", cache, *before, **LONG) as group:
        group.wait_for_step(3)
        group.members[-1].send_signal(signal.SIGTERM)
        assert group.codes() == [ExitCode.PREEMPTED] * before[0], group.said(0)
    saved = figures(tmp_path / "first")[-1]["step"]
    assert (tmp_path / "first" / "checkpoints" / str(saved) / "manifest.json").is_file()
    for processes, devices in after:
        folder = tmp_path / f"{processes}x{devices}"
        shutil.copytree(tmp_path / "first", folder)
        with Group(folder, cache, processes, devices, **LONG) as group:
            group.finish()
            assert f"going on from step {saved} " in group.said(0)
        assert_same(folder, tmp_path / "whole", ADAPTER)


def test_quickstart_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(ConfigError, match="quickstart is for one process, not 2"):
        quickstart(console=Console(quiet=True))


def test_a_folder_that_is_not_shared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"process 0 does not see .*config\.json, .* Set output_dir to a folder"):
        files.check_shared(tmp_path, seconds=0.0)
