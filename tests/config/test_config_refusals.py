"""Configs: what is refused and in which words, what None means, and that every shipped one builds."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import pytest

from jaxft.config import RunConfig, default_config, from_json, load, resolve
from jaxft.config.fields import Section, all_fields, own_fields
from jaxft.errors import ConfigError, JaxftError

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "configs").glob("*.py"))
BODY = """
from jaxft.config import default_config

def get_config(arg=None):
    config = default_config()
    config.model.path = "model"
    config.data.train = "train.jsonl"
    {line}
    return config
"""
GOOD = {"model": {"path": "model"}, "data": {"train": "train.jsonl"}}


def with_fields(fields):
    nested = json.loads(json.dumps(GOOD))
    for key, value in fields.items():
        *sections, name = key.split(".")
        node = nested
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return nested


@pytest.fixture
def file(tmp_path):
    """file(line) -> a config file with one more line in it."""

    def write(line=""):
        (tmp_path / "run.py").write_text(BODY.format(line=line))
        return str(tmp_path / "run.py")

    return write


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model.dtype": "float16"}, "model.dtype='float16' is not one of float32, bfloat16"),
        ({"model.param_dtype": "bf16"}, "model.param_dtype='bf16' is not one of"),
        (
            {"model.remat": "ful"},
            "model.remat='ful' is not one of none, full, attention, dots, offload. Did you mean 'full'?",
        ),
        ({"adapter.kind": "lorra"}, "adapter.kind='lorra'.*Did you mean 'lora'?"),
        ({"adapter.init_lora_weights": "pisa"}, "init_lora_weights='pisa' is not one of default, gaussian, pissa"),
        (
            {"adapter.layers_to_transform": "0-3,x"},
            "layers_to_transform='0-3,x': 'x' is neither a layer such as 8 nor a range such as 0-3",
        ),
        ({"adapter.layers_to_transform": "3-0"}, "'3-0' is neither a layer"),
        ({"adapter.layers_to_transform": " "}, "layers_to_transform is empty"),
        ({"adapter.rank_pattern": "q_proj"}, "rank_pattern='q_proj': 'q_proj' is not of the form pattern:int"),
        ({"adapter.rank_pattern": "q_proj:0"}, "'q_proj:0' needs a pattern and a number above zero"),
        ({"adapter.alpha_pattern": "q_(proj:2"}, "'q_(proj:2' is not of the form pattern:float"),
        ({"data.format": "mesages"}, "data.format='mesages'.*Did you mean 'messages'?"),
        ({"data.train_on": "user"}, "data.train_on='user' is not one of assistant, last, all"),
        ({"data.truncation": "left"}, "data.truncation='left' is not one of refuse, drop, right"),
        ({"optim.name": "adam"}, "optim.name='adam'.*Did you mean 'adamw'?"),
        ({"optim.name": "adamw8bit"}, "optim.name='adamw8bit'.*Did you mean 'adamw_8bit'?"),
        *(
            (
                {f"optim.{key}": value, "optim.name": name, "optim.schedule": "constant", "adapter.kind": "none"},
                f"optim.{key}={value!r} is read only if optim.name is {key.split('.')[0]!r}, but optim.name={name!r}. "
                f"Set optim.{key} to {default!r}, or set optim.name to {key.split('.')[0]!r}.{hint}$",
            )
            for key, value, default, name, hint in [
                ("adamw.b2", 0.95, 0.999, "sgd", ""),
                ("adamw.b1", 0.8, 0.9, "lion", " With optim.name='lion', optim.lion.b1 is read."),
                ("adamw_8bit.eps", 1e-6, 1e-8, "lion", ""),
                ("sgd.momentum", 0.8, 0.9, "adamw", ""),
                ("apollo.rank", 64, 256, "muon", ""),
                ("adafactor.scale_parameter", True, False, "adamw_8bit", ""),
                ("lion.moments_dtype", "bfloat16", "float32", "adafactor", ""),
                ("muon.b1", 0.8, 0.9, "schedule_free_adamw", " With .*, optim.schedule_free_adamw.b1 is read."),
                ("schedule_free_adamw.b2", 0.99, 0.999, "adafactor", ""),
            ]
        ),
        ({"optim.name": "schedule_free_adamw"}, "so optim.schedule='cosine' would slow it down twice: set optim.sch"),
        (
            {"optim.name": "schedule_free_adamw", "optim.schedule": "constant", "optim.schedule_free_adamw.b1": 0.0},
            "optim.schedule_free_adamw.b1=0.0 must be above 0 and below 1: without it there is no average; usual are",
        ),
        (
            {"optim.name": "schedule_free_adamw", "optim.schedule": "constant", "train.ema_decay": 0.9},
            "averages the weights itself: set train.ema_decay=0.9 to None",
        ),
        ({"optim.name": "apollo"}, "projects large matrices to a low rank, and adapter.kind='lora' trains only a few"),
        *(
            (
                {"optim.loraplus_lr_ratio": 16.0, "adapter.kind": kind},
                f"optim.loraplus_lr_ratio=16.0 is read only if adapter.kind is 'lora', but adapter.kind='{kind}'. It "
                "scales the learning rate of LoRA's B. Set optim.loraplus_lr_ratio to None, or set adapter.kind to",
            )
            for kind in ("none", "vera")
        ),
        *(
            (
                {f"adapter.{name}": value, "adapter.kind": kind},
                f"adapter.{name}={value!r} is read only if adapter.kind is {reader!r}, but adapter.kind={kind!r}. Set",
            )
            for name, value, reader in [
                ("use_rslora", True, "lora"),
                ("use_dora", True, "lora"),
                ("init_lora_weights", "pissa", "lora"),
                ("exclude_modules", "q_proj", "lora"),
                ("layers_to_transform", "0", "lora"),
                ("rank_pattern", "q_proj:8", "lora"),
                ("alpha_pattern", "q_proj:8", "lora"),
                ("feedforward_modules", "up_proj", "ia3"),
                ("prompt_init_text", "hi", "prompt"),
            ]
            for kind in ("none", "vera", "prefix")
        ),
        (
            {"model.quantization": "nf4", "adapter.kind": "none"},
            "model.quantization='nf4' is read only if adapter.kind is 'lora', 'vera', 'ia3', 'prompt' or 'prefix', but "
            "adapter.kind='none'. Quantized weights are frozen, but adapter.kind='none' trains every weight. Set",
        ),
        ({"adapter.init_lora_weights": "loftq"}, "init_lora_weights='loftq' corrects the error of quantization, but"),
        (
            {"adapter.init_lora_weights": "loftq", "adapter.use_dora": True, "model.quantization": "nf4"},
            "init_lora_weights='loftq' changes the base that the lengths of adapter.use_dora are taken from: set adap",
        ),
        (
            {"adapter.kind": "prefix", "adapter.modules_to_save": "norm"},
            "modules_to_save='norm' cannot be written to PEFT's folders of adapter.kind='prefix'",
        ),
        (
            {"method.sft.loss_type": "dft", "method.sft.label_smoothing_factor": 0.1},
            "set method.sft.label_smoothing_factor=0.1 to 0",
        ),
        ({"method.sft.loss_type": "nl"}, "method.sft.loss_type='nl' is not one of nll, dft"),
        ({"method.name": "sfd"}, "method.name='sfd' is not one of sft, dpo. Did you mean 'sft'?"),
        (
            {"train.use_ema": False},
            "train.use_ema=False is read only if train.ema_decay is set, but it is not. There is no average to leave "
            "out. Set train.use_ema to True, or set train.ema_decay.",
        ),
        *(
            ({key: value}, f"{key}={value} must be above 0 and below 1$")
            for key in ("optim.layer_decay", "data.eval_fraction")
            for value in (0.0, 1.0, 1.5)
        ),
        *(
            ({key: -1.0}, f"{key}=-1.0 must be zero or more")
            for key in ("method.sft.z_loss", "router.z_loss", "router.load_balancing", "optim.weight_decay")
        ),
        ({"optim.schedule": "cosin"}, "optim.schedule='cosin'.*Did you mean 'cosine'?"),
        ({"checkpoint.best_mode": "lowest"}, "checkpoint.best_mode='lowest' is not one of min, max"),
        ({"eval.metric": "bleu", "data.eval": "e"}, "eval.metric='bleu' is not one of"),
        *(
            ({key: value}, f"{key}={value} must be above zero")
            for key, value in {
                "adapter.r": 0,
                "adapter.alpha": 0.0,
                "adapter.num_virtual_tokens": 0,
                "data.max_length": 0,
                "data.limit": -1,
                "data.eval_limit": 0,
                "optim.learning_rate": 0.0,
                "optim.adamw.eps": 0.0,
                "optim.adamw_8bit.eps": 0.0,
                "optim.muon.eps": -1.0,
                "optim.schedule_free_adamw.eps": 0.0,
                "optim.clip_norm": -1.0,
                "optim.apollo.rank": 0,
                "optim.loraplus_lr_ratio": 0.0,
                "method.sft.neftune_noise_alpha": 0.0,
                "train.batch_size": 0,
                "train.accumulation_steps": -2,
                "train.epochs": 0.0,
                "train.steps": 0,
                "train.log_every": 0,
                "train.eval_every": 0,
                "checkpoint.every": 0,
                "checkpoint.keep": 0,
                "eval.limit": 0,
                "eval.max_new_tokens": 0,
                "eval.batch_size": 0,
            }.items()
        ),
        *(
            ({key: value}, f"{key}={value} must be at least 0 and below 1")
            for key, value in {
                "adapter.dropout": 1.0,
                "optim.warmup_ratio": -0.1,
                "optim.adamw.b1": 1.0,
                "optim.adamw.b2": 1.0,
                "optim.lion.b1": 1.0,
                "optim.lion.b2": -0.5,
                "optim.sgd.momentum": 1.0,
                "optim.muon.momentum": 1.0,
                "method.sft.label_smoothing_factor": 1.0,
                "train.ema_decay": 1.0,
            }.items()
        ),
        ({"optim.min_ratio": 1.5}, "optim.min_ratio=1.5 must be from 0 to 1"),
        ({"optim.learning_rate": float("nan")}, "optim.learning_rate=nan must be above zero"),
        ({"model.path": ""}, "model.path is empty"),
        ({"data.train": ""}, "data.train is empty"),
        (
            {"optim.warmup_steps": 5, "optim.warmup_ratio": 0.1},
            "at most one of optim.warmup_steps and optim.warmup_ratio",
        ),
        ({"optim.warmup_steps": -5}, "optim.warmup_steps=-5 must be zero or more"),
        (
            {"train.batch_size": 10, "train.accumulation_steps": 4},
            "train.batch_size=10 does not divide into train.accumulation_steps=4",
        ),
        ({"adapter.target_modules": " , "}, "adapter.target_modules is empty"),
        (
            {"adapter.kind": "prompt", "adapter.num_virtual_tokens": 64, "data.max_length": 64},
            "leaves no room for rows",
        ),
        ({"adapter.kind": "prefix", "export.merged": True}, "adapter.kind='prefix' cannot be merged into weights"),
        (
            {"model.trainable": "mlp"},
            "model.trainable='mlp' is read only if adapter.kind is 'none', but adapter.kind='lora'. It chooses which "
            "parameters of the model are trained, and beside an adapter all are frozen. Set model.trainable to None",
        ),
        ({"data.eval": "e", "data.eval_fraction": 0.1}, "two held-out sets"),
        ({"eval.metric": "exact_match"}, "eval.metric='exact_match' scores held-out rows, but there are none"),
        ({"eval.metric": "exact_match", "data.eval": "e", "data.format": "text"}, "data.format='text' has no answers"),
        ({"checkpoint.best_metric": "eval_loss"}, "checkpoint.best_metric='eval_loss' needs held-out rows"),
        (
            {"checkpoint.best_metric": "eval_loss", "data.eval": "e", "checkpoint.every": 3, "train.eval_every": 2},
            "checkpoint.every=3 is not a multiple of train.eval_every=2: set train.eval_every to a divisor",
        ),
        ({"mesh.data": 0}, "mesh.data=0 must be a positive number"),
        ({"mesh.fsdp": -2}, "mesh.fsdp=-2 must be a positive number"),
        ({"mesh.data": -1, "mesh.fsdp": -1}, "only one mesh axis may be -1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_carried_out_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?").replace("(", r"\(").replace("+", r"\+")):
        resolve(with_fields(fields))


# What has to be set as well for a choice to be accepted.
COMPANIONS = {
    "optim.name": {"optim.schedule": "constant", "adapter.kind": "none"},
    "eval.metric": {"data.eval_fraction": 0.1},
    "checkpoint.best_metric": {"data.eval_fraction": 0.1},
}


def test_every_choice_is_accepted():
    fields = [field for field in all_fields(RunConfig).values() if field.choices and "NAME" not in field.key]
    for field in fields:
        section, _, leaf = field.key.rpartition(".")
        chosen = {"optim.name": section.split(".")[1]} if section.startswith("optim.") else {}
        companions = COMPANIONS["optim.name"] | chosen if chosen else COMPANIONS.get(field.key, {})
        for value in field.choices:
            config = resolve(with_fields({**companions, field.key: value}))
            assert functools.reduce(getattr, section.split("."), config).__getattribute__(leaf) == value


def test_every_field_has_a_meaning_and_depends_on_fields_that_exist():
    fields = all_fields(RunConfig)
    for key, field in fields.items():
        assert field.meaning and "\n" not in field.meaning and "|" not in field.meaning, key
        for dependency in field.dependencies:
            assert dependency.key in fields, f"{key} is read by {dependency.key}"
            known = fields[dependency.key].choices
            assert set(dependency.values) <= set(known), f"{key} is read by {dependency.key}={dependency.values}"


@pytest.mark.parametrize("section", ["optim", "method"])
def test_a_section_is_chosen_by_its_name(section):
    fields = {field.key.removeprefix(f"{section}."): field for field in own_fields(type(getattr(RunConfig(), section)))}
    sections = [name for name, field in fields.items() if issubclass(field.base, Section)]
    assert fields["name"].chooses_section and list(fields["name"].choices) == sections
    for key, field in all_fields(type(getattr(RunConfig(), section)), f"{section}.").items():
        name = key.split(".")[1]
        if name in sections:
            assert (field.dependencies[0].key, field.dependencies[0].values) == (f"{section}.name", (name,))


def test_fields_that_may_change_when_a_run_is_resumed():
    assert {key.split(".")[0] if key.startswith(("mesh.", "export.")) else key for key, field in
            all_fields(RunConfig).items() if field.free_to_change} == {
        "output_dir", "model.remat", "mesh", "train.log_every", "train.eval_every", "checkpoint.keep",
        "checkpoint.every", "export",
    }  # fmt: skip


UNKNOWN = [
    ("train.batchsize", r"unknown config key 'train.batchsize'. Did you mean 'train.batch_size'\?"),
    ("train.learning_rate", r"unknown config key 'train.learning_rate'. Did you mean .*'optim.learning_rate'"),
    ("optm.learning_rate", r"unknown config key 'optm.learning_rate'. Did you mean 'optim.learning_rate'\?"),
    ("train.loss_type", r"unknown config key 'train.loss_type'. Did you mean 'method.sft.loss_type'\?"),
    ("train.z_loss", r"unknown config key 'train.z_loss'. Did you mean 'method.sft.z_loss' or 'router.z_loss'\?"),
    ("train.neftune_noise_alpha", r"Did you mean 'method.sft.neftune_noise_alpha'\?"),
    ("train.label_smoothing_factor", r"Did you mean 'method.sft.label_smoothing_factor'\?"),
    ("optim.rank", r"unknown config key 'optim.rank'. Did you mean 'optim.apollo.rank'\?"),
    ("optim.momentum", r"Did you mean 'optim.sgd.momentum' or 'optim.muon.momentum'\?"),
    ("optim.b1", r"Did you mean 'optim.adamw.b1', 'optim.adamw_8bit.b1', .* or 'optim.schedule_free_adamw.b1'\?"),
    ("optim.adamw.epsilon", r"unknown config key 'optim.adamw.epsilon'. Did you mean 'optim.adamw.eps'\?"),
]


@pytest.mark.parametrize(("key", "message"), UNKNOWN)
def test_unknown_keys_are_refused_wherever_they_stand(file, key, message):
    with pytest.raises(ConfigError, match=message):
        load(file(), {key: 4})
    with pytest.raises(ConfigError, match=message):
        load(file(), [f"{key}=4"])
    with pytest.raises(ConfigError, match="unknown config key"):
        resolve(with_fields({key: 4}))
    with pytest.raises(ConfigError, match="unknown config key .*Did you mean"):
        load(file(f"config.{key} = 4"))


def test_an_unknown_top_level_key_is_refused(file):
    for refused in (
        lambda: load(file(), ["sed=1"]),
        lambda: resolve(GOOD | {"sed": 1}),
        lambda: load(file(), {"sed": 1}),
    ):
        with pytest.raises(ConfigError, match=r"unknown config key 'sed'. Did you mean 'seed'\?"):
            refused()


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("train.batch_size", "big", "train.batch_size=big: the field takes int"),
        ("train.batch_size", "1.5", "train.batch_size=1.5: the field takes int"),
        ("optim.learning_rate", "fast", "optim.learning_rate=fast: the field takes float"),
        ("train.batch_size", "None", "train.batch_size=None: the field takes int and cannot be left out"),
        ("model.path", "None", "model.path=None: the field takes str and cannot be left out"),
        ("data.packing", "maybe", "data.packing|maybe"),
    ],
)
def test_values_of_another_type_are_refused_on_the_command_line(file, key, text, message):
    with pytest.raises(ConfigError, match=message):
        load(file(), [f"{key}={text}"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.batch_size", 1.5, "'train.batch_size' takes int, got 1.5"),
        ("train.batch_size", "4", "'train.batch_size' takes int, got '4'"),
        ("train.batch_size", True, "'train.batch_size' takes int, got True"),
        ("train.batch_size", None, "'train.batch_size' takes int, got None"),
        ("optim.learning_rate", True, "'optim.learning_rate' takes float, got True"),
        ("data.packing", 1, "'data.packing' takes bool, got 1"),
        ("data.eval", 3, "'data.eval' takes str, got 3"),
        ("train", 3, "config key 'train' is a section; got 3"),
    ],
)
def test_values_of_another_type_are_refused_in_a_mapping(key, value, message):
    with pytest.raises(ConfigError, match=message):
        resolve(with_fields({key: value}))


@pytest.mark.parametrize(
    "line", ["config.train.batch_size = 'four'", "config.train = 3", "config.optim.clip_norm = 'x'"]
)
def test_values_of_another_type_are_refused_in_a_file(file, line):
    with pytest.raises(ConfigError, match="run.py|config key"):
        load(file(line))


@pytest.mark.parametrize(
    ("key", "value"),
    [("train.batch_size", "four"), ("train.batch_size", 1.5), ("optim.clip_norm", "x"), ("data.packing", "yes")],
)
def test_values_of_another_type_are_refused_in_overrides_by_mapping(file, key, value):
    with pytest.raises(ConfigError, match=key):
        load(file(), {key: value})


def test_lists_and_patterns_are_text_that_a_command_line_can_say(file):
    adapter = load(
        file(), ["adapter.layers_to_transform=0-2,8", "adapter.rank_pattern=q_proj:8, layers.0.mlp.up_proj:32",
                 "adapter.alpha_pattern=o_proj:2.5", "adapter.modules_to_save=embed_tokens,norm"]
    ).adapter  # fmt: skip
    assert adapter.layers == (0, 1, 2, 8)
    assert adapter.ranks == {"q_proj": 8, "layers.0.mlp.up_proj": 32}
    assert adapter.alphas == {"o_proj": 2.5}
    assert adapter.saved == ("embed_tokens", "norm") and adapter.excluded == ()


def test_overrides_by_text_and_by_mapping_agree(file):
    by_text = load(
        file(), ["train.batch_size=4", "optim.learning_rate=1e-3", "data.packing=False", "optim.clip_norm=None",
                 "train.steps=7", "data.eval=a=b.jsonl", "optim.warmup_ratio=0.1", "adapter.alpha=8"]
    )  # fmt: skip
    by_mapping = load(
        file(), {"train.batch_size": 4, "optim.learning_rate": 1e-3, "data.packing": False, "optim.clip_norm": None,
                 "train.steps": 7, "data.eval": "a=b.jsonl", "optim.warmup_ratio": 0.1, "adapter.alpha": 8}
    )  # fmt: skip
    assert by_text == by_mapping
    assert by_text.optim.clip_norm is None
    assert (by_text.train.steps, by_text.data.eval) == (7, "a=b.jsonl")
    assert isinstance(by_text.adapter.alpha, float)


def test_none_empties_what_a_file_had_filled(file):
    path = file("config.train.steps = 9")
    assert load(path).train.steps == 9
    assert load(path, ["train.steps=None"]).train.steps is None
    assert load(path, {"train.steps": None}).train.steps is None


@pytest.mark.parametrize("override", ["train.batch_size", "=4", "train batch=3"])
def test_overrides_of_another_form_are_refused(file, override):
    with pytest.raises(ConfigError, match="is not of the form section.field=value"):
        load(file(), [override])


def test_a_missing_file_lists_those_that_exist(file):
    path = file()
    with pytest.raises(ConfigError, match=r"no config file .*rum.py'. Did you mean 'run.py'\? Files there: run.py"):
        load(path.replace("run.py", "rum.py"))
    with pytest.raises(ConfigError, match="Files there: none"):
        load("/nowhere/run.py")


def test_what_a_file_raises_is_told_with_its_name(file):
    with pytest.raises(ConfigError, match="run.py: invalid literal for int"):
        load(file("int('four')"))
    with pytest.raises(ConfigError, match="too few rows"):
        load(file("from jaxft.errors import ConfigError; raise ConfigError('too few rows')"))


def test_an_argument_reaches_the_file(file):
    path = file("config.seed = int(arg or 0)")
    assert load(path + ":12").seed == 12
    assert load(path).seed == 0


def test_a_config_survives_json(tmp_path):
    config = load(str(SHIPPED[0]))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert from_json(str(tmp_path / "config.json")) == config
    assert resolve(config.to_dict()) == config


def test_defaults_of_files_and_of_dataclasses_are_the_same():
    assert default_config().to_dict() == RunConfig().to_dict()


def test_configs_are_frozen_and_default_ones_locked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().seed = 3
    with pytest.raises((AttributeError, KeyError)):
        default_config().sead = 3
    assert issubclass(ConfigError, JaxftError)


def test_targets_are_split_at_commas():
    config = resolve(with_fields({"adapter.target_modules": "q_proj, v_proj,"}))
    assert config.adapter.targets == ("q_proj", "v_proj")


@pytest.mark.parametrize("arg", ["", ":smoke"])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_builds(path, arg):
    plain, config = load(str(path)), load(f"{path}{arg}")
    assert config.output_dir == plain.output_dir + arg.replace(":", "-")
    if arg:
        assert config.model.random_init
        assert config.train.steps <= 4
        assert (config.adapter.kind, config.optim.name, config.data.packing) == (
            plain.adapter.kind, plain.optim.name, plain.data.packing,
        )  # fmt: skip


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_another_argument_is_refused(path):
    with pytest.raises(ConfigError, match=r"config argument 'smok' is not known. Did you mean 'smoke'\?"):
        load(f"{path}:smok")


def test_every_field_is_read_somewhere():
    text = "\n".join(
        path.read_text(encoding="utf-8")
        for path in (ROOT / "jaxft").rglob("*.py")
        if "config" not in path.relative_to(ROOT / "jaxft").parts
    )
    unread = {key for key in all_fields(RunConfig) if not re.search(rf"\.{key.rsplit('.')[-1]}\b", text)}
    # Read otherwise: `mesh` whole, by axis; lists and patterns of adapters through `targets`, `excluded` and `alphas`;
    # fields of a mixture's set through `DataConfig.of_set`.
    assert unread <= {
        "mesh.data", "mesh.fsdp", "mesh.slice", "mesh.context", "mesh.tensor", "mesh.expert", "adapter.target_modules",
        "adapter.exclude_modules", "adapter.layers_to_transform", "adapter.rank_pattern", "adapter.alpha_pattern",
        "adapter.modules_to_save", "adapter.num_virtual_tokens", "data.stages", "data.mixture.NAME.weight",
    }  # fmt: skip


# Mixtures

SETS = {"general": {"path": "a.jsonl", "weight": 0.7, "format": "messages"}, "domain": {"path": "b.jsonl", "limit": 5}}


def mixed(**data):
    return {"model": {"path": "model"}, "data": {"mixture": SETS} | data}


@pytest.fixture
def mixture_file(tmp_path):
    path = tmp_path / "mixed.py"
    lines = "config.data.train = ''\n    " + "\n    ".join(
        f"config.data.mixture.{name} = mixture_set(**{fields!r})" for name, fields in SETS.items()
    )
    path.write_text(BODY.format(line=lines).replace("import default_config", "import default_config, mixture_set"))
    return str(path)


def test_a_mixture_is_sections_under_free_names(mixture_file):
    assert load(mixture_file) == resolve(mixed())
    changed = load(
        mixture_file, ["data.mixture.domain.weight=2", "data.mixture.domain.limit=None", "data.mixture.general.split=x"]
    )
    assert changed.data.mixture["domain"].weight == 2.0 and changed.data.mixture["domain"].limit is None
    assert changed.data.mixture["general"].split == "x"
    assert resolve(json.loads(json.dumps(changed.to_dict()))) == changed
    whole = load(mixture_file, {"data.mixture": {"only": {"path": "c.jsonl"}}})
    assert list(whole.data.mixture) == ["only"]


def test_a_set_is_read_with_its_own_settings_in_place_of_the_common_ones():
    data = resolve(mixed(text_field="body", train_split="all", limit=9)).data
    general, domain = data.of_set("general"), data.of_set("domain")
    assert (general.train, general.format, general.limit) == ("a.jsonl", "messages", 9)
    assert (domain.train, domain.format, domain.limit) == ("b.jsonl", "auto", 5)
    assert {one.text_field for one in (general, domain)} == {"body"} and domain.train_split == "all"
    assert not general.mixture


def test_stages():
    data = resolve(mixed(stages="0.7: general, domain=2; 0.3: domain")).data
    assert data.schedule == ((0.7, {"general": 0.7, "domain": 2.0}), (0.3, {"domain": 1.0}))
    assert resolve(mixed()).data.schedule == ((1.0, {"general": 0.7, "domain": 1.0}),)
    assert resolve(mixed(stages="1: general, domain=0; 0: domain")).data.schedule[0] == (1.0, {"general": 0.7})


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"train": "x.jsonl"}, r"data.train='x.jsonl' and data.mixture both name training sets"),
        ({"mixture": {"a b": {"path": "x"}}}, r"data.mixture.a b: the name of a set must consist of letters"),
        ({"mixture": {"a": {}}}, r"data.mixture.a.path is empty"),
        ({"mixture": {"a": {"path": "x", "format": "csv"}}}, r"data.mixture.a.format='csv' is not one of auto"),
        ({"mixture": {"a": {"path": "x", "train_on": "user"}}}, r"data.mixture.a.train_on='user' is not one of"),
        ({"mixture": {"a": {"path": "x", "weight": -1}}}, r"data.mixture.a.weight=-1.0 must be zero or more"),
        ({"mixture": {"a": {"path": "x", "weight": 0.0}}}, r"no set has a weight above zero"),
        ({"mixture": {"a": {"path": "x", "max_epochs": 0}}}, r"data.mixture.a.max_epochs=0.0 must be above zero"),
        ({"mixture": {"a": {"path": "x", "waight": 1}}}, r"'data.mixture.a.waight'.*Did you mean"),
        ({"mixture": {"a": 3}}, r"'data.mixture.a' is a section"),
        (
            {"mixture": {}, "train": "x", "stages": "1: a"},
            r"data.stages='1: a' is read only if data.mixture is set, but it is not. It weighs the sets",
        ),
        (
            {"stages": "1: general, domian"},
            r"has a set 'domian', which is not in data.mixture. Did you mean 'domain'.* Known: general, domain",
        ),
        ({"stages": "0.5: general; 0.4: domain"}, r"add up to 0.9, not to 1"),
        ({"stages": "x: general; 0.4: domain"}, r"'x' must be a number"),
        ({"stages": "0.6: general=-1; 0.4: domain"}, r"'-1' must be a number that is not negative"),
        ({"stages": "0.6: general, general; 0.4: domain"}, r"has 'general' twice"),
        ({"stages": "0.6: general=0; 0.4: domain"}, r"no set has a weight above zero in the stage of 0.6"),
        ({"stages": "1: general"}, r"domain would never be trained on"),
    ],
)
def test_mixtures_that_cannot_be(fields, complaint):
    with pytest.raises(ConfigError, match=complaint):
        resolve(mixed(**fields))


def test_a_misspelt_field_of_a_set_is_refused(mixture_file, tmp_path):
    with pytest.raises(ConfigError, match=r"data.mixture.domain.wait.*Did you mean 'data.mixture.NAME.weight'"):
        load(mixture_file, ["data.mixture.domain.wait=2"])
    with pytest.raises(ConfigError, match=r"unknown config key 'domian'"):
        load(mixture_file, ["data.mixture.domian.weight=2"])
    Path(mixture_file).write_text(Path(mixture_file).read_text().replace("'weight'", "'wieght'"))
    with pytest.raises(ConfigError, match=r"a mixture set has no field 'wieght'.*Did you mean 'weight'"):
        load(mixture_file)
