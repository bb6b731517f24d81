"""Commands without a config: flags, overrides, other programs' spellings, versions, and errors without a traceback."""

import json
import sys
from importlib.metadata import version

import pytest

from jaxft import cli
from jaxft.assets import ASSETS
from jaxft.cli import settings
from jaxft.config import RunConfig, load
from jaxft.config.fields import all_fields
from jaxft.errors import ExitCode

MODEL = ["--model", str(ASSETS / "smoke")]
DATA = ["--data", str(ASSETS / "quickstart" / "train.jsonl")]


@pytest.fixture
def config_of(monkeypatch):
    """config_of(*arguments) -> the config that `jaxft data` would examine."""
    import jaxft.runs.examine as examine

    seen = []
    monkeypatch.setattr(examine, "examine", lambda config, *_, **__: seen.append(config))

    def run(*arguments: str) -> RunConfig:
        assert cli.main(["data", *arguments]) == 0
        return seen[-1]

    return run


def test_flags_set_what_they_name_and_leave_the_rest_at_its_default(config_of):
    flags = {
        "model": "m", "data": "r.jsonl", "eval_data": "h.jsonl", "output": "o", "epochs": "2.5", "steps": "7",
        "learning_rate": "1e-4", "batch_size": "8", "accumulation": "2", "max_length": "64", "chat_template": "t.jinja",
        "lora_r": "4", "lora_alpha": "8", "dtype": "bfloat16", "eval_every": "3", "save_every": "5",
        "report_to": "wandb", "seed": "9",
    }  # fmt: skip
    config = config_of(*(f"--{name}={value}" for name, value in flags.items()), "--no_packing", "--qlora")
    expected = load(None, [
        "model.path=m", "data.train=r.jsonl", "data.eval=h.jsonl", "output_dir=o", "train.epochs=2.5", "train.steps=7",
        "optim.learning_rate=1e-4", "train.batch_size=8", "train.accumulation_steps=2", "data.max_length=64",
        "data.chat_template=t.jinja", "adapter.r=4", "adapter.alpha=8", "model.dtype=bfloat16",
        "model.param_dtype=bfloat16", "train.eval_every=3", "checkpoint.every=5", "train.report_to=wandb",
        "seed=9", "data.packing=False",
        "model.quantization=nf4",
    ])  # fmt: skip
    assert config == expected
    assert config_of("--model=m", "--data=r.jsonl", "--full").adapter.kind == "none"
    assert all(field in all_fields(RunConfig) for flag in settings.FLAGS for field in flag.fields)


def test_every_spelling_of_an_option_means_the_same(config_of):
    base = ["--model=m", "--data=r.jsonl"]
    reference = config_of(*base, "--learning_rate=1e-5", "--steps=3")
    for spelling in (
        ["--learning-rate=1e-5", "--steps", "3"],
        ["--lr", "1e-5", "--train.steps=3"],
        ["--optim.learning_rate=1e-5", "--train.steps", "3"],
        ["--config.optim.learning-rate=1e-5", "--config.train.steps=3"],
    ):
        assert config_of(*base, *spelling) == reference


def test_a_switch_needs_no_value(config_of):
    for rest in ([], ["--seed=1"], ["--data.bad_rows=skip"]):
        assert config_of("--model=m", "--data=r.jsonl", "--data.merge_turns", *rest).data.merge_turns
    assert not config_of("--model=m", "--data=r.jsonl", "--data.merge_turns", "False").data.merge_turns


def test_flags_go_over_a_config_and_the_run_folder_is_named_after_model_and_rows(config_of, tmp_path):
    (tmp_path / "run.yaml").write_text("model: {path: m}\ndata: {train: r.jsonl}\ntrain: {steps: 4, batch_size: 2}\n")
    config = config_of(f"--config={tmp_path / 'run.yaml'}", "--steps=9")
    assert (config.train.steps, config.train.batch_size) == (9, 2)
    named = config_of("--model=hf://owner/Some-1B@main", "--data=~/sets/support rows.jsonl.gz")
    assert named.output_dir == "runs/Some-1B-support_rows"


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("lr=1e-4", "unknown argument 'lr=1e-4': write --lr=1e-4"),
        ("train.steps=3", "write --steps=3"),
        ("adapter.r=8", "write --lora_r=8"),
        ("optim.schedule=linear", "write --optim.schedule=linear"),
        ("--output_dir2=x", "unknown argument '--output_dir2=x'."),
        ("--cutoff_len=512", "write --max_length=512"),
        ("--cutoff-len", "write --max_length=VALUE"),
        ("--num_train_epochs=3", "write --epochs=3"),
        (
            "--per_device_train_batch_size=4",
            "write --batch_size=VALUE, which counts the sequences of an optimizer step",
        ),
        ("--gradient_accumulation_steps=4", "write --accumulation=VALUE, which divides train.batch_size"),
        ("--max_steps=10", "write --steps=10"),
        ("--lora_rank=8", "write --lora_r=8"),
        ("--warmup_ratio=0.1", "write --optim.warmup_ratio=0.1"),
        ("--model_name_or_path=x", "write --model=x"),
        ("--config.lr=1e-4", "unknown config key 'lr': lr is optim.learning_rate"),
        ("--config.train.max_steps=4", "unknown config key 'train.max_steps'. Did you mean 'train.steps'?"),
        ("--optim=sgd", "optim is a section, whose fields are set one by one, such as --optim.name=VALUE"),
        ("--batchsize=4", "Did you mean '--batch_size'?"),
        ("--steps=3", ""),
        ("--train.steps", "--train.steps has no value"),
        ("--steps=many", "train.steps=many must be a whole number or None"),
        ("--data.packing=maybe", "data.packing=maybe must be True or False"),
    ],
)
def test_other_spellings_are_answered_with_the_right_one(config_of, capsys, argument, hint):
    base = ["data", "--model=m", "--data=r.jsonl"]
    assert cli.main([*base, argument]) == (2 if hint else 0)
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "train needs a model and rows: --model=PATH --data=ROWS, or a config: --config=NAME"),
        (["data", "--data=r.jsonl"], "data needs a model and rows"),
        (["train", "--model=m"], "data.train is empty"),
        (["train", "--config=no_such_config"], "no config named 'no_such_config'"),
        (["data", "--model=m", "--data=r", "--steps=3", "--train.steps=4"], "--steps and --train.steps=4 both set"),
        (["generate", "--model=m", "--lr=3"], "unknown argument '--lr=3'"),
        (["generate", "--model=m", "--train.steps=3"], "--train.steps=3 changes a config, and generate reads none"),
        (["eval", "--model=m"], "--model=PATH with --eval_data=ROWS"),
        (["data", *MODEL, "--data=/dev/full/rows.jsonl"], "/dev/full/rows.jsonl"),
    ],
)
def test_what_is_missing_or_twice_is_refused(capsys, arguments, message):
    assert cli.main(arguments) == ExitCode.REFUSED
    assert message in capsys.readouterr().err


def test_data_needs_no_config(capsys):
    assert cli.main(["data", *MODEL, *DATA, "--max_length=512", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 402


def test_versions_are_told(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    python = ".".join(map(str, sys.version_info[:3]))
    assert capsys.readouterr().out == f"jaxft {version('jaxft')}, jax {version('jax')}, Python {python}\n"


def test_an_error_of_the_operating_system_has_no_traceback(config_of, capsys, monkeypatch):
    import jaxft.runs.examine as examine

    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "rows.jsonl")

    monkeypatch.setattr(examine, "examine", fail)
    assert cli.main(["data", "--model=m", "--data=r"]) == ExitCode.REFUSED
    said = capsys.readouterr().err
    assert said.startswith("jaxft data: rows.jsonl: Permission denied. Give yourself permission")
