"""The command line of `jaxft pod`: its options, and the dry run, which is the run itself on paper."""

import json
import shlex

import pytest

from jaxft import cli
from jaxft.pods import command

VERBS = ("create", "describe", "list", "ssh", "scp", "delete", "list-instances")
RUN = ["pod", "run", "--config=configs/quickstart.py:smoke", "--project=my-project", "--zone=us-east5-b"]
SLICE = [*RUN, "--topology=v6e:2x4", "--to=gs://bucket/run-1", "--name=run-1", "--max_hours=4"]


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    def refused(argv, **how):
        raise AssertionError(f"a command was run: {argv}")

    monkeypatch.setattr(command.subprocess, "run", refused)


def dry(capsys, *options, code=0):
    assert cli.main([*SLICE, *options, "--dry_run"]) == code
    printed = capsys.readouterr()
    return printed.out.splitlines() if code == 0 else printed.err


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--topology=v6e:4x4"],
        ["--topology=v5e:4x4", "--slices=2", "--spot", "--save_every=2"],
        ["--api=tpu", "--iap", "--queue_hours=2"],
    ],
    ids=["instance", "group", "queue", "node"],
)
def test_a_dry_run_prints_a_whole_life(capsys, options):
    lines = dry(capsys, *options)
    commands = [shlex.split(line, comments=True) for line in lines if not line.startswith("#")]
    assert all(words[0] == "gcloud" and "--project=my-project" in words for words in commands)
    verbs = [next(word for word in words if word in VERBS) for words in commands]
    created, deleted = ([shlex.join(words) for words, verb in zip(commands, verbs, strict=True) if verb == wanted]
                        for wanted in ("create", "delete"))  # fmt: skip
    assert created and len(deleted) == len(created)
    hosts = [at for at, verb in enumerate(verbs) if verb in ("ssh", "scp")]
    assert verbs.index("create") < hosts[0] and hosts[-1] < verbs.index("delete")
    for waits in ("the machines are ready", "the host answers", "training has ended", "the API no longer knows of it"):
        assert any(line.startswith("gcloud ") and line.endswith(f"  # again until {waits}") for line in lines), waits
    assert any(line.startswith("# at most 4.0 h, USD ") for line in lines)
    assert any(line.startswith("# does the step fit? jaxft plan ") for line in lines)


def test_a_dry_run_holds_no_secret(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdef")
    lines = dry(capsys, "--env=HF_TOKEN")
    assert not [line for line in lines if "hf_0123456789abcdef" in line]


def test_json_stands_alone(capsys):
    assert cli.main([*SLICE, "--dry_run", "--json"]) == 0
    printed = capsys.readouterr()
    json.loads(printed.out)
    assert "gcloud compute instances create run-1-1 " in printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--spot", "--config.checkpoint.every=None"],
            "without checkpoint.every all steps since the start would be lost",
        ),
        (["--max_usd=10"], "--max_usd=10: the run could cost more, at most 4.0 h, USD 86.40"),
        (["--topology=v6e:3x3"], "no such slice of v6e"),
        (["--env=ABSENT_KEY_OF_A_TEST"], "is not set in this environment"),
        (["--zones=a"], "unknown argument '--zones=a'. Did you mean '--zone'?"),
        (["--config.train.batchsize=3"], "Did you mean 'train.batch_size'?"),
    ],
)
def test_refused_before_anything_is_run(capsys, options, message):
    text = dry(capsys, *options, code=2)
    assert text.startswith("jaxft pod run: ") and message in text


def test_the_name_comes_from_the_run_folder(capsys):
    assert cli.main([*RUN, "--topology=v6e:2x4", "--to=gs://bucket/r", "--output=runs/My_Run", "--dry_run"]) == 0
    assert "gcloud compute instances create my-run-1 " in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["run", "status", "logs", "stop", "fetch", "delete", "list"])
def test_every_verb_explains_itself(capsys, verb):
    with pytest.raises(SystemExit) as ended:
        cli.main(["pod", verb, "--help"])
    assert ended.value.code == 0 and f"usage: jaxft pod {verb}" in capsys.readouterr().out
