"""Every shipped config resolves, and its smoke form passes `jaxft data`."""

import json
from pathlib import Path

import pytest
from config_files import SHIPPED

from jaxft import cli
from jaxft.config import MeshConfig, load
from jaxft.errors import ConfigError

by_name = pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)


@by_name
def test_resolves(path: Path) -> None:
    config = load(str(path))
    assert config.output_dir.startswith("runs/") and not config.output_dir.endswith("-smoke")


@by_name
def test_smoke_passes_the_examination(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", f"--config={path}:smoke", "--json"]) == 0
    examination = json.loads(capsys.readouterr().out)
    assert (examination["rows"], examination["eval"]["rows"]) == (24, 4)
    # Of prompts nothing is trained: the model answers them itself.
    assert (examination["trained_tokens"] > 0) == (examination["formats"].keys() != {"prompt"})


@by_name
def test_smoke_keeps_the_method(path: Path) -> None:
    whole, smoke = load(str(path)), load(f"{path}:smoke")
    assert smoke.output_dir == f"{whole.output_dir}-smoke"
    assert smoke.model.random_init and smoke.train.steps == 4
    assert smoke.adapter.kind == whole.adapter.kind
    assert smoke.adapter.target_modules == whole.adapter.target_modules
    assert (smoke.optim.name, smoke.optim.schedule) == (whole.optim.name, whole.optim.schedule)
    assert smoke.data.packing == whole.data.packing
    assert not smoke.data.chat_template_kwargs  # of which the smoke model's template reads none
    assert smoke.mesh == MeshConfig()  # which any number of devices takes


@pytest.mark.parametrize("mixture", [False, True])
def test_smoke_has_pairs_for_a_method_of_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mixture: bool
) -> None:
    """Whatever columns the run itself reads."""
    sets = "config.data.train = ''; config.data.mixture.one = mixture_set(path='p', prompt_field='q')"
    path = tmp_path / "pairs.py"
    path.write_text(
        "from jaxft.config import default_config, mixture_set\nfrom jaxft.config.smoke import with_arg\n"
        "def get_config(arg=None):\n    config = default_config()\n    config.method.name = 'dpo'\n"
        "    config.data.train = 'rows.jsonl'\n    config.data.prompt_field = 'question'\n"
        f"    {sets if mixture else 'pass'}\n    return with_arg(config, arg)\n"
    )
    assert cli.main(["data", f"--config={path}:smoke", "--json"]) == 0
    examination = json.loads(capsys.readouterr().out)
    assert (examination["rows"], examination["eval"]["rows"]) == (24, 4)
    assert not examination["dropped"] and examination["formats"] == {"preference": 24}


@by_name
def test_another_argument_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'smok' is not known.*Did you mean 'smoke'"):
        load(f"{path}:smok")


def test_no_two_configs_share_a_run_folder() -> None:
    folders = [load(str(path)).output_dir for path in SHIPPED]
    assert len(folders) == len(set(folders))
