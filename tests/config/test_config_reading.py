"""How configs are read: files, overrides, JSON; unknown keys and values of another type."""

import dataclasses
import json

import pytest
from config_files import GOOD, SHIPPED, with_fields

from jaxft.config import RunConfig, default_config, from_json, load, resolve
from jaxft.errors import ConfigError, JaxftError

UNKNOWN = [
    ("train.batchsize", r"unknown config key 'train.batchsize'. Did you mean 'train.batch_size'\?"),
    ("train.learning_rate", r"unknown config key 'train.learning_rate'. Did you mean .*'optim.learning_rate'"),
    ("optm.learning_rate", r"unknown config key 'optm.learning_rate'. Did you mean 'optim.learning_rate'\?"),
    ("train.loss_type", r"unknown config key 'train.loss_type'. Did .*'method.sft.loss_type'"),
    ("train.z_loss", r"unknown config key 'train.z_loss'. Did you mean 'method.sft.z_loss' or 'router.z_loss'\?"),
    ("train.neftune_noise_alpha", r"Did you mean 'method.sft.neftune_noise_alpha'\?"),
    ("train.label_smoothing_factor", r"Did you mean 'method.sft.label_smoothing_factor'\?"),
    ("optim.rank", r"unknown config key 'optim.rank'. Did you mean 'optim.apollo.rank'\?"),
    ("optim.momentum", r"Did you mean 'optim.sgd.momentum' or 'optim.muon.momentum'\?"),
    ("optim.b1", r"Did you mean 'optim.adamw.b1', 'optim.adamw_8bit.b1', 'optim.lion.b1', .* or 'optim.*.b1'\?"),
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
        ("train.batch_size", "big", "train.batch_size=big must be a whole number$"),
        ("train.batch_size", "1.5", "train.batch_size=1.5 must be a whole number$"),
        ("optim.learning_rate", "fast", "optim.learning_rate=fast must be a number$"),
        ("train.batch_size", "None", "train.batch_size=None must be a whole number$"),
        ("model.path", "None", "model.path=None must be text$"),
        ("data.packing", "maybe", "data.packing=maybe must be True or False$"),
    ],
)
def test_values_of_another_type_are_refused_on_the_command_line(file, key, text, message):
    with pytest.raises(ConfigError, match=message):
        load(file(), [f"{key}={text}"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.batch_size", 1.5, "train.batch_size=1.5 must be a whole number$"),
        ("train.batch_size", "4", "train.batch_size='4' must be a whole number$"),
        ("train.batch_size", True, "train.batch_size=True must be a whole number$"),
        ("train.batch_size", None, "train.batch_size=None must be a whole number$"),
        ("optim.learning_rate", True, "optim.learning_rate=True must be a number$"),
        ("optim.learning_rate", float("nan"), "optim.learning_rate=nan must be"),
        ("adapter.alpha", float("inf"), "adapter.alpha=inf must be a number that is finite"),
        ("adapter.alpha", 10**400, r"adapter.alpha=1000+\.\.\. is beyond the numbers of 64 bits"),
        ("train.steps", 2**63, r"train.steps=9223372036854775808\.\.\. is beyond the whole numbers of 64 bits"),
        ("data.packing", 1, "data.packing=1 must be True or False$"),
        ("data.eval", 3, "data.eval=3 must be text or None$"),
        ("train", 3, "config key 'train' is a section: set its fields one by one, instead of all to 3"),
    ],
)
def test_values_of_another_type_are_refused_in_a_mapping(key, value, message):
    with pytest.raises(ConfigError, match=message):
        resolve(with_fields({key: value}))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.train.batch_size = 'four'", r"train\.batch_size must be a whole number, not four \(str\)"),
        ("config.optim.clip_norm = 'x'", r"optim\.clip_norm must be a number or None, not x \(str\)"),
        ("config.data.packing = 1", r"data\.packing must be True or False, not 1 \(int\)"),
        ("config.train = 3", "config key 'train' is a section: set its fields one by one, such as 'train.batch_size'"),
    ],
)
def test_values_of_another_type_are_refused_in_a_file_with_its_line(file, line, message):
    with pytest.raises(ConfigError, match=rf"run\.py, line 8: {message}$"):
        load(file(line))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.train.batchsize = 4", "unknown config key 'train.batchsize'. Did you mean 'train.batch_size'"),
        ("config.optm.name = 'sgd'", "unknown config key 'optm'. Did you mean 'optim'"),
        (
            "config.train.loss_type = 'dft'",
            "unknown config key 'train.loss_type'. Did you mean .*'method.sft.loss_type'",
        ),
        ("setattr(config, 'sead', 1)", "unknown config key 'sead'. Did you mean 'seed'"),
    ],
)
def test_an_unknown_key_in_a_file_is_refused_with_its_line(file, line, message):
    with pytest.raises(ConfigError, match=rf"run\.py, line 8: {message}"):
        load(file(line))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.batch_size", "four", "train.batch_size='four' must be a whole number$"),
        ("train.batch_size", 1.5, "train.batch_size=1.5 must be a whole number$"),
        ("train.steps", 1.5, "train.steps=1.5 must be a whole number or None$"),
        ("optim.clip_norm", "x", "optim.clip_norm='x' must be a number or None$"),
        ("data.packing", "yes", "data.packing='yes' must be True or False$"),
        ("optim", 3, "config key 'optim' is a section: set its fields one by one, instead of all to 3"),
        ("data.mixture", 3, "config key 'data.mixture' is a section: set its fields one by one, instead of all to 3"),
        ("data.mixture", {"a": {"path": 3}}, "data.mixture.NAME.path=3 must be text$"),
    ],
)
def test_values_of_another_type_are_refused_in_overrides_by_mapping(file, key, value, message):
    with pytest.raises(ConfigError, match=message):
        load(file(), {key: value})


def test_a_section_is_overridden_by_a_mapping_and_not_by_text(file):
    assert load(file(), {"optim": {"clip_norm": None, "adamw": {"b2": 0.95}}}).optim.adamw.b2 == 0.95
    with pytest.raises(ConfigError, match=r"unknown config key 'optim.clipnorm'. Did you mean 'optim.clip_norm'\?"):
        load(file(), {"optim": {"clipnorm": None}})
    with pytest.raises(ConfigError, match="config key 'optim.adamw' is a section: set its fields one by one, such as"):
        load(file(), ["optim.adamw=3"])


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
    with pytest.raises(ConfigError, match="run.py, line 8: invalid literal for int"):
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


def test_variables_of_templates_are_given_under_names_of_their_own(file):
    key = "data.chat_template_kwargs"
    wanted = {"enable_thinking": False, "reasoning_effort": "low", "limit": 3}
    dotted = [f"{key}.enable_thinking=false", f"{key}.reasoning_effort=low", f"{key}.limit=3"]
    for line, overrides in (
        (f"config.{key} = {wanted!r}", ()),
        (f"config.{key}.update(enable_thinking=False, reasoning_effort='low', limit=3)", []),
        ("", {key: wanted}),
        ("", [f"{key}={json.dumps(wanted)}"]),
        ("", dotted),
        (f"config.{key}.limit = 7", dotted),
    ):
        config = load(file(line), overrides)
        assert config.data.chat_template_kwargs == wanted
        assert resolve(json.loads(json.dumps(config.to_dict()))) == config
    assert load(file(), [f"{key}.enable_thinking=None"]).data.chat_template_kwargs == {"enable_thinking": None}
    with pytest.raises(ConfigError, match="must be a JSON object, such as"):
        load(file(), [f"{key}=false"])
    with pytest.raises(ConfigError, match="must be an object of names and values"):
        resolve(with_fields({key: "low"}))
