"""Configs: what is refused and in which words, what None means, and that every shipped one builds."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxft import config_checks
from jaxft.config import RunConfig, default_config, from_json, load, resolve
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
        ({"adapter.layers_to_transform": "0-3,x"}, "layers_to_transform='0-3,x': 'x' is no layer"),
        ({"adapter.layers_to_transform": "3-0"}, "'3-0' is no layer"),
        ({"adapter.layers_to_transform": " "}, "layers_to_transform is empty"),
        ({"adapter.rank_pattern": "q_proj"}, "rank_pattern='q_proj': 'q_proj' is not of the form pattern:int"),
        ({"adapter.rank_pattern": "q_proj:0"}, "'q_proj:0' wants a pattern and a number above zero"),
        ({"adapter.alpha_pattern": "q_(proj:2"}, "'q_(proj:2' is not of the form pattern:float"),
        ({"data.format": "mesages"}, "data.format='mesages'.*Did you mean 'messages'?"),
        ({"data.train_on": "user"}, "data.train_on='user' is not one of assistant, last, all"),
        ({"data.truncation": "left"}, "data.truncation='left' is not one of refuse, drop, right"),
        ({"optim.name": "adam"}, "optim.name='adam'.*Did you mean 'adamw'?"),
        ({"optim.name": "adamw8bit"}, "optim.name='adamw8bit'.*Did you mean 'adamw_8bit'?"),
        *(
            (
                {f"optim.{field}": value, "optim.name": name, "optim.schedule": "constant", "adapter.kind": "none"},
                f"optim.{field}={value!r} does nothing with optim.name={name!r}.* read by ",
            )
            for field, value, name in [
                ("b2", 0.95, "sgd"),
                ("b1", 0.8, "adafactor"),
                ("eps", 1e-6, "lion"),
                ("momentum", 0.9, "adamw"),
                ("rank", 64, "muon"),
                ("scale_parameter", True, "adamw_8bit"),
                ("moments_dtype", "bfloat16", "adafactor"),
                ("moments_dtype", "bfloat16", "adamw_8bit"),
                ("moments_dtype", "bfloat16", "schedule_free_adamw"),
            ]
        ),
        ({"optim.name": "schedule_free_adamw"}, "so optim.schedule='cosine' would slow it down twice: set optim.sch"),
        (
            {"optim.name": "schedule_free_adamw", "optim.schedule": "constant", "optim.b1": 0.0},
            "optim.b1=0 leaves schedule_free_adamw without an average",
        ),
        (
            {"optim.name": "schedule_free_adamw", "optim.schedule": "constant", "train.ema_decay": 0.9},
            "averages the weights itself: set train.ema_decay to None",
        ),
        ({"optim.name": "apollo"}, "projects whole matrices to a low rank, and adapter.kind='lora' trains few numbers"),
        ({"optim.loraplus_lr_ratio": 16.0, "adapter.kind": "none"}, "loraplus_lr_ratio=16.0 is of LoRA's B against"),
        ({"optim.loraplus_lr_ratio": 16.0, "adapter.kind": "vera"}, "adapter.kind='vera' has neither: set it to None"),
        (
            {"adapter.kind": "prefix", "adapter.modules_to_save": "norm"},
            "modules_to_save='norm' has no place in PEFT's folders of adapter.kind='prefix'",
        ),
        (
            {"train.loss_type": "dft", "train.label_smoothing_factor": 0.1},
            "set train.label_smoothing_factor=0.1 to 0",
        ),
        ({"train.loss_type": "nl"}, "train.loss_type='nl' is not one of nll, dft"),
        ({"train.use_ema": False}, "train.use_ema=False does nothing without train.ema_decay"),
        ({"optim.layer_decay": 1.0}, "optim.layer_decay=1.0 must be above 0 and below 1"),
        ({"train.z_loss": -1.0}, "train.z_loss=-1.0 must not be negative"),
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
                "data.eval_fraction": 0.0,
                "optim.learning_rate": 0.0,
                "optim.eps": 0.0,
                "optim.clip_norm": -1.0,
                "optim.rank": 0,
                "optim.loraplus_lr_ratio": 0.0,
                "train.neftune_noise_alpha": 0.0,
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
                "data.eval_fraction": 1.5,
                "optim.warmup_ratio": -0.1,
                "optim.b1": 1.0,
                "optim.b2": 1.0,
                "optim.momentum": 1.0,
                "train.label_smoothing_factor": 1.0,
                "train.ema_decay": 1.0,
            }.items()
        ),
        ({"optim.min_ratio": 1.5}, "optim.min_ratio=1.5 must be from 0 to 1"),
        ({"optim.weight_decay": -0.1}, "optim.weight_decay=-0.1 must not be negative"),
        ({"optim.learning_rate": float("nan")}, "optim.learning_rate=nan must be above zero"),
        ({"model.path": ""}, "model.path is empty"),
        ({"data.train": ""}, "data.train is empty"),
        (
            {"optim.warmup_steps": 5, "optim.warmup_ratio": 0.1},
            "at most one of optim.warmup_steps and optim.warmup_ratio",
        ),
        ({"optim.warmup_steps": -5}, "optim.warmup_steps=-5 must not be negative"),
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
        ({"adapter.prompt_init_text": "hi"}, "adapter.prompt_init_text is of adapter.kind='prompt', not of 'lora'"),
        ({"model.trainable": "mlp"}, "model.trainable='mlp' says which parameters of the model move, but"),
        ({"data.eval": "e", "data.eval_fraction": 0.1}, "two held-out sets"),
        ({"eval.metric": "exact_match"}, "eval.metric scores held-out rows, but"),
        ({"eval.metric": "exact_match", "data.eval": "e", "data.format": "text"}, "data.format='text' has no answers"),
        ({"checkpoint.best_metric": "eval_loss"}, "checkpoint.best_metric='eval_loss' needs held-out rows"),
        ({"mesh.data": 0}, "mesh.data=0 must be a positive number"),
        ({"mesh.fsdp": -2}, "mesh.fsdp=-2 must be a positive number"),
        ({"mesh.data": -1, "mesh.fsdp": -1}, "only one mesh axis may be -1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_carried_out_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?").replace("(", r"\(")):
        resolve(with_fields(fields))


def test_every_choice_is_accepted():
    choices = {
        "model.dtype": config_checks.DTYPES, "model.remat": config_checks.REMAT_POLICIES,
        "adapter.kind": config_checks.ADAPTERS, "optim.schedule": config_checks.SCHEDULES,
        "data.format": config_checks.FORMATS, "data.train_on": config_checks.TRAIN_ON,
        "data.truncation": config_checks.TRUNCATION,
        "train.loss_type": config_checks.LOSS_TYPES,
    }  # fmt: skip
    for key, values in choices.items():
        for value in values:
            resolve(with_fields({key: value}))
    for name in config_checks.OPTIMIZERS:
        resolve(with_fields({"optim.name": name, "optim.schedule": "constant", "adapter.kind": "none"}))
    for metric in config_checks.METRICS:
        assert resolve(with_fields({"eval.metric": metric, "data.eval_fraction": 0.1})).eval.metric == metric


UNKNOWN = [
    ("train.batchsize", r"unknown config key 'train.batchsize'. Did you mean 'train.batch_size'\?"),
    ("train.learning_rate", r"unknown config key 'train.learning_rate'. Did you mean .*'optim.learning_rate'"),
    ("optm.learning_rate", r"unknown config key 'optm.learning_rate'. Did you mean 'optim.learning_rate'\?"),
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
        if path.name not in ("config.py", "smoke.py")
    )
    for section in dataclasses.fields(RunConfig):
        value = getattr(RunConfig(), section.name)
        names = [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else [section.name]
        unread = [name for name in names if f".{name}" not in text]
        # Read otherwise: `mesh` whole, by axis; lists and patterns of adapters through `targets`, `excluded` and
        # `alphas`; optim.name by its check alone.
        otherwise = {"data", "fsdp", "target_modules", "exclude_modules", "alpha_pattern", "name"}
        assert set(unread) <= otherwise, f"{section.name}: {unread}"


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
        ({"mixture": {"a b": {"path": "x"}}}, r"data.mixture.a b: the name of a set is made of letters"),
        ({"mixture": {"a": {}}}, r"data.mixture.a.path is empty"),
        ({"mixture": {"a": {"path": "x", "format": "csv"}}}, r"data.mixture.a.format='csv' is not one of auto"),
        ({"mixture": {"a": {"path": "x", "train_on": "user"}}}, r"data.mixture.a.train_on='user' is not one of"),
        ({"mixture": {"a": {"path": "x", "weight": -1}}}, r"data.mixture.a.weight=-1.0 must not be negative"),
        ({"mixture": {"a": {"path": "x", "weight": 0.0}}}, r"no set has a weight above zero"),
        ({"mixture": {"a": {"path": "x", "max_epochs": 0}}}, r"data.mixture.a.max_epochs=0.0 must be above zero"),
        ({"mixture": {"a": {"path": "x", "waight": 1}}}, r"'data.mixture.a.waight'.*Did you mean"),
        ({"mixture": {"a": 3}}, r"'data.mixture.a' is a section"),
        ({"mixture": {}, "train": "x", "stages": "1: a"}, r"data.mixture, which is empty"),
        (
            {"stages": "1: general, domian"},
            r"has a set 'domian', which .*Did you mean 'domain'.* Known: general, domain",
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
