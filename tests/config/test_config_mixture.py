"""Mixtures of sets: sections under names of the user's own, and stages."""

import json
from pathlib import Path

import pytest
from config_files import BODY

from jaxft.config import load, resolve
from jaxft.errors import ConfigError

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
        (
            {"mixture": {"a": {"path": "x", "weight": 0.0}}},
            r"data.mixture: no set has a weight above zero, so that there are no rows",
        ),
        ({"mixture": {"a": {"path": "x", "max_epochs": 0}}}, r"data.mixture.a.max_epochs=0.0 must be above zero"),
        ({"mixture": {"a": {"path": "x", "waight": 1}}}, r"'data.mixture.a.waight'.*Did you mean"),
        ({"mixture": {"a": 3}}, r"'data.mixture.a' is a section"),
        (
            {"mixture": {}, "train": "x", "stages": "1: a"},
            r"data.stages='1: a' is read only if data.mixture is set, but it is not. It weighs the sets of a mixture. "
            "Set data.stages to None, or set data.mixture.",
        ),
        (
            {"stages": "1: general, domian"},
            r"has a set 'domian', which is not in data.mixture. Did you mean 'domain'.* Known: general, domain",
        ),
        ({"stages": "0.5: general; 0.4: domain"}, r"add up to 0.9, not to 1"),
        ({"stages": "x: general; 0.4: domain"}, r"'x' must be a number"),
        ({"stages": "0.6: general=-1; 0.4: domain"}, r"'-1' must be a number that is not negative"),
        ({"stages": "0.6: general, general; 0.4: domain"}, r"has 'general' twice"),
        (
            {"stages": "0.6: general=0; 0.4: domain"},
            r"data.stages='0.6.*': in the stage of 0.6: no set has a weight above zero",
        ),
        ({"stages": "1: general"}, r"domain would never be trained on"),
    ],
)
def test_mixtures_that_cannot_be(fields, complaint):
    with pytest.raises(ConfigError, match=complaint):
        resolve(mixed(**fields))


def test_a_misspelt_field_of_a_set_is_refused(mixture_file, tmp_path):
    with pytest.raises(ConfigError, match=r"data.mixture.domain.wait.*Did you mean 'data.mixture.NAME.weight'"):
        load(mixture_file, ["data.mixture.domain.wait=2"])
    with pytest.raises(ConfigError, match=r"no set 'domian'. Did you mean 'domain'\?"):
        load(mixture_file, ["data.mixture.domian.weight=2"])
    Path(mixture_file).write_text(Path(mixture_file).read_text().replace("'weight'", "'wieght'"))
    with pytest.raises(ConfigError, match=r"a mixture set has no field 'wieght'.*Did you mean 'weight'"):
        load(mixture_file)
