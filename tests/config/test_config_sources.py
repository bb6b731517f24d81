"""Configs that are no Python file of today: YAML, JSON, run folders, shipped names, files that are no configs."""

import json
from pathlib import Path

import pytest
import yaml
from config_files import GOOD, ROOT

from jaxft.config import RunConfig, load, resolve
from jaxft.config.fields import all_fields
from jaxft.config.peer_names import FIELDS, NAMES
from jaxft.config.reading import shipped_names
from jaxft.errors import ConfigError

YAML = """
output_dir: runs/2026-11-29
model: {path: model}
data:
  train: rows.jsonl
  eval: null
  packing: no
adapter:
  target_modules: [q_proj, "v_proj"]
  rank_pattern: {q_proj: 8}
  layers_to_transform: 007
optim:
  learning_rate: 1e-4
  clip_norm: ~
  adamw.b2: 0.95
train:
  steps: 1e3
model.remat: none
"""


@pytest.fixture
def written(tmp_path):
    """written(name, text) -> the path of a file."""

    def write(name: str, text: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write


def test_yaml_is_read_by_the_types_of_the_fields_and_not_by_its_own(written):
    own = yaml.safe_load(YAML)
    assert own["optim"]["learning_rate"] == "1e-4" and own["adapter"]["layers_to_transform"] == 7  # YAML's own types
    config = load(written("run.yaml", YAML))
    assert config.output_dir == "runs/2026-11-29"
    assert (config.optim.learning_rate, config.optim.clip_norm, config.optim.adamw.b2) == (1e-4, None, 0.95)
    assert (config.data.packing, config.data.eval, config.train.steps) == (False, None, 1000)
    assert config.adapter.targets == ("q_proj", "v_proj") and config.adapter.ranks == {"q_proj": 8}
    assert (config.adapter.layers_to_transform, config.model.remat) == ("007", "none")


def test_flags_go_over_yaml_and_yaml_over_defaults(written):
    path = written("run.yml", YAML)
    assert load(path, ["optim.learning_rate=3e-5", "data.eval=held.jsonl"]).optim.learning_rate == 3e-5
    assert load(path).train.batch_size == RunConfig().train.batch_size


def test_yaml_and_json_take_mixtures_and_the_smoke_argument(written):
    text = "model: {path: m}\ndata:\n  mixture:\n    one: {path: a.jsonl, weight: 2}\n    two: {path: b.jsonl}\n"
    mixture = load(written("run.yaml", text)).data.mixture
    assert (mixture["one"].weight, mixture["two"].path) == (2.0, "b.jsonl")
    smoke = load(written("run.yaml", YAML) + ":smoke")
    assert smoke.model.random_init and smoke.train.steps == 4 and smoke.adapter.targets == ("q_proj", "v_proj")
    assert load(written("run.yaml", text) + ":smoke").data.mixture["one"].weight == 2.0


def test_lists_of_paths_are_the_lists_that_the_sources_of_rows_read(written):
    from jaxft.data.sources.listing import names_in

    config = load(written("run.yaml", "model: {path: m}\ndata: {train: [a.jsonl, 'b, c.jsonl']}\n"))
    assert names_in(config.data.train) == ["a.jsonl", "b, c.jsonl"]


def test_lists_in_python_are_taken_where_yaml_takes_them(written):
    text = (
        "from jaxft.config import default_config, mixture_set\n"
        "def get_config(arg=None):\n"
        "    config = default_config()\n"
        "    config.model.path, config.data.train, config.data.eval = 'm', ['a.jsonl', 'b, c.jsonl'], ('d.jsonl',)\n"
        "    config.adapter.target_modules = ['q_proj', 'v_proj']\n"
        "    %s\n"
        "    return config\n"
    )
    config = load(written("lists.py", text % ""))
    assert json.loads(config.data.train) == ["a.jsonl", "b, c.jsonl"] and json.loads(config.data.eval) == ["d.jsonl"]
    assert config.adapter.target_modules == "q_proj,v_proj"
    sets = "config.data.train = ''; config.data.mixture.one = mixture_set(path=['a.jsonl', 'b.jsonl'])"
    assert json.loads(load(written("mixed.py", text % sets)).data.mixture["one"].path) == ["a.jsonl", "b.jsonl"]
    with pytest.raises(ConfigError, match=r"data.train=5 must be text"):
        load(written("number.py", text % "config.data.train = 5"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  steps: 3\n  steps: 4\n", r"run.yaml, line 2: 'steps' is set twice"),
        ("train: {stepz: 3}", r"run.yaml: unknown config key 'train.stepz'. Did you mean 'train.steps'\?"),
        ("train: {steps: many}", "train.steps=many must be a whole number or None"),
        ("data: {packing: maybe}", "data.packing=maybe must be True or False"),
        ("train: 3", "config key 'train' is a section"),
        ("data: {train: [a.jsonl, {b: c}]}", "data.train="),
        ("a: &a {b: 1}\ntrain:\n  <<: *a\n", "merge keys"),
        ("train: [1", "is not valid YAML"),
        ("a: 1\n---\nb: 2\n", "is not valid YAML"),
        ("- 1\n- 2\n", "a config is a mapping of sections"),
        ("", "holds nothing"),
        (b"\x80\x81", "is not valid YAML"),
        ("{" * 1200, "is not valid YAML"),
        ("model_type: llama\nhidden_size: 8\n", "describes a model, not a run"),
    ],
)
def test_yaml_that_is_no_config_is_refused(written, text, message):
    with pytest.raises(ConfigError, match=message):
        load(written("run.yaml", text))


@pytest.mark.parametrize(
    ("program", "text", "lines"),
    [
        (
            "axolotl",
            "base_model: m\nmicro_batch_size: 2\nsequence_len: 512\nnum_epochs: 3\nlearning_rate: 2e-4\n",
            [
                "base_model is model.path",
                "micro_batch_size is train.batch_size, which counts",
                "num_epochs is train.ep",
            ],
        ),
        (
            "LLaMA-Factory",
            "model_name_or_path: m\nstage: sft\nfinetuning_type: lora\ncutoff_len: 512\nlora_target: all\n",
            ["cutoff_len is data.max_length", "lora_target is adapter.target_modules, where all-linear"],
        ),
        (
            "TRL",
            "model_name_or_path: m\ndataset_name: d\nper_device_train_batch_size: 8\nlora_r: 8\n",
            ["dataset_name is data.train", "lora_r is adapter.r"],
        ),
        (
            "torchtune",
            "model:\n  _component_: torchtune.models.llama3_1.lora_llama3_1_8b\n  lora_rank: 8\nepochs: 1\n",
            ["lora_rank is adapter.r"],
        ),
    ],
)
def test_configs_of_other_programs_are_refused_with_what_corresponds(written, program, text, lines):
    with pytest.raises(ConfigError, match=f"is a config of {program}, and is not converted") as error:
        load(written("run.yaml", text))
    assert all(line in str(error.value) for line in lines)
    if program != "torchtune":
        with pytest.raises(ConfigError, match=f"is a config of {program}"):
            load(written("run.json", json.dumps(yaml.safe_load(text))))


def test_every_name_of_another_program_leads_to_a_field_and_is_none_itself():
    known = all_fields(RunConfig)
    assert set(FIELDS) <= set(known)
    assert sum(len(names.split()) for names, _ in FIELDS.values()) == len(NAMES)
    assert not set(NAMES) & {field for field in known if "." not in field}


def test_a_run_folder_is_a_config(written, tmp_path):
    (tmp_path / "run").mkdir()
    config = resolve(GOOD | {"output_dir": "elsewhere", "seed": 7})
    path = written("run/config.json", json.dumps(config.to_dict()))
    assert load(path) == config
    moved = load(str(tmp_path / "run"), ["train.steps=3"])
    assert (moved.seed, moved.train.steps, moved.output_dir) == (7, 3, str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="is a folder without config.json"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"seed": 1, "seed": 2}', "'seed' is set twice"),
        ('{"seed": 1', "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1]", "a config is a mapping"),
        ('{"model_type": "llama", "hidden_size": 8}', "describes a model"),
        ('{"model": {"path": "m"}, "data": {"train": 3}}', "data.train=3 must be text"),
    ],
)
def test_json_that_is_no_config_is_refused(written, text, message):
    with pytest.raises(ConfigError, match=message):
        load(written("run.json", text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "defines no get_config"),
        ("get_config = 3\n", "get_config is not a function"),
        ("def get_config(arg=None):\n    return None\n", "returns None: it must return the config"),
        ("def get_config(arg=None):\n    return 3\n", "returns 3"),
        ("import os\ndef get_config(arg=None):\n    return os.environ['NO_SUCH']\n", "line 3: KeyError: 'NO_SUCH'"),
        ("import no_such_module\ndef get_config(): ...\n", "line 1: No module named 'no_such_module'"),
        ("raise SystemExit(3)\ndef get_config(): ...\n", "line 1: SystemExit: 3"),
        ("def get_config(:\n", "line 1: .*it is not Python"),
        ("model:\n  path: get_config\n", "it is not Python"),
        (b"\xff\x00get_config", "not a text file in UTF-8"),
        ("get_config\x00", "it is not Python|null bytes"),
    ],
)
def test_python_that_is_no_config_is_refused(written, text, message):
    with pytest.raises(ConfigError, match=message):
        load(written("run.py", text))


def test_a_file_without_get_config_is_not_run(written, tmp_path):
    with pytest.raises(ConfigError, match="defines no get_config"):
        load(written("train_trl.py", f"open({str(tmp_path / 'trace')!r}, 'w')\n"))
    assert not (tmp_path / "trace").exists()


def test_an_argument_that_a_file_does_not_take_is_refused(written):
    path = written(
        "run.py", "from jaxft.config import default_config\ndef get_config():\n    return default_config()\n"
    )
    with pytest.raises(ConfigError, match="takes no argument, but 'smoke' is given"):
        load(f"{path}:smoke")


def test_a_mapping_is_a_config_too(written):
    text = f"def get_config(arg=None):\n    return {GOOD | {'seed': 5}!r}\n"
    assert load(written("run.py", text), {"train.steps": 2}) == resolve(GOOD | {"seed": 5, "train": {"steps": 2}})


def test_shipped_configs_are_known_by_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_path = load(str(ROOT / "configs" / "llama3_1_8b_lora.py"))
    assert load("llama3_1_8b_lora") == by_path == load("configs/llama3_1_8b_lora.py")
    assert load("quickstart:smoke").train.steps == 4
    assert shipped_names() == sorted(path.stem for path in Path(ROOT / "configs").glob("*.py"))
    with pytest.raises(ConfigError, match=r"no config named 'lama3_1_8b_lora'. Did you mean 'llama3_1_8b_lora'\? Ship"):
        load("lama3_1_8b_lora")
    with pytest.raises(ConfigError, match="config argument 'smok' is not known"):
        load("quickstart:smok")
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match="rows.jsonl is no config by its name"):
        load("rows.jsonl")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("data.packing=no", False), ("data.packing=On", True), ("data.eval=null", None), ("data.eval=None", None),
        ("data.eval=", None), ("optim.learning_rate=1e-4", 1e-4), ("train.steps=2e2", 200),
        ("adapter.kind=none", "none"), ("adapter.target_modules=['q_proj', 'v_proj']", "q_proj,v_proj"),
        ("train.steps=1_000", 1000),
    ],
)  # fmt: skip
def test_texts_are_read_by_the_type_of_their_field(text, value):
    nested = load(None, ["model.path=m", "data.train=r.jsonl", text]).to_dict()
    for name in text.partition("=")[0].split("."):
        nested = nested[name]
    assert nested == value and type(nested) is type(value)


@pytest.mark.parametrize("text", ["optim.learning_rate=nan", "optim.clip_norm=inf", "train.steps=1.5", "seed=x"])
def test_texts_that_are_no_numbers_are_refused(text):
    with pytest.raises(ConfigError, match="must be a"):
        load(None, ["model.path=m", "data.train=r.jsonl", text])
