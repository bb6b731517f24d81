"""Configs as Python, YAML and JSON, and overrides of them: every field with values of every kind, and damaged text."""

import json
from pathlib import Path
from typing import Any

import yaml
from fuzz.limits import one_input
from fuzz.values import NASTY, SCALARS, TEXTS, as_bytes, damaged, fixed, nested
from hypothesis import given
from hypothesis import strategies as st

from jaxft.cli.settings import read_overrides, underscored
from jaxft.config import RunConfig, load
from jaxft.config.fields import all_fields

FIELDS = {key.replace(".NAME.", ".one."): field for key, field in all_fields(RunConfig).items()}
PARTS = sorted({part for key in FIELDS for part in key.split(".")})
KEYS = st.one_of(
    st.sampled_from(sorted(FIELDS)), st.sampled_from(sorted(FIELDS)),
    st.lists(st.one_of(st.sampled_from(PARTS), TEXTS), min_size=1, max_size=3).map(".".join),
)  # fmt: skip
CHOICES = sorted({choice for field in FIELDS.values() for choice in field.choices})
VALUES = st.one_of(st.sampled_from(CHOICES), SCALARS, nested(st.one_of(st.sampled_from(PARTS), TEXTS)))
# Half of them set a field to a value of its own type.
GOOD = st.sampled_from(sorted(FIELDS)).flatmap(
    lambda key: st.tuples(st.just(key), st.sampled_from([FIELDS[key].default, *FIELDS[key].choices]))
)
ASSIGNMENTS = st.lists(st.one_of(GOOD, GOOD, st.tuples(KEYS, VALUES)), max_size=4)
NEEDED = {"output_dir": "x", "model": {"path": "m"}, "data": {"train": "rows.jsonl"}}


def tree(assignments: list[tuple[str, Any]]) -> dict[str, Any]:
    """Nested sections with these values; a value in the way of a section is replaced."""
    out = json.loads(json.dumps(NEEDED))
    for key, value in assignments:
        *sections, last = key.split(".")
        node = out
        for name in sections:
            if not isinstance(node.get(name), dict):
                node[name] = {}
            node = node[name]
        node[last] = value
    return out


def as_yaml(values: dict[str, Any]) -> bytes:
    return yaml.dump(values, allow_unicode=True).encode("utf-8", "surrogatepass")


def as_json(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode("utf-8", "surrogatepass")


def as_python(assignments: list[tuple[str, Any]]) -> bytes:
    lines = [f"    config.{key} = {value!r}" for key, value in assignments]
    head = "from jaxft.config import default_config\n\n\ndef get_config(arg=None):\n    config = default_config()\n"
    return "\n".join([head, *lines, "    return config\n"]).encode("utf-8", "surrogatepass")


FILES = st.one_of(
    st.tuples(st.just("yaml"), damaged(ASSIGNMENTS.map(tree).map(as_yaml))),
    st.tuples(st.just("json"), damaged(ASSIGNMENTS.map(tree).map(as_json))),
    # Python is what its author wants it to be; here only its values and fields vary, and single characters.
    st.tuples(st.just("py"), ASSIGNMENTS.map(as_python)),
    st.tuples(st.sampled_from(["yaml", "yml", "json"]), st.one_of(st.binary(max_size=40), TEXTS.map(as_bytes))),
)


@fixed(20_000)
@given(file=FILES, arg=st.one_of(st.just(""), st.sampled_from([":smoke", ":", ":a:b"])))
def files_of_configs(file: tuple[str, bytes], arg: str) -> None:
    path = Path(f"config.{file[0]}")
    path.write_bytes(file[1])
    with one_input():
        load(f"{path}{arg if file[0] == 'py' else ''}")


OVERRIDES = st.one_of(
    st.builds(lambda key, value: f"--{key}={value}", KEYS, st.one_of(*map(VALUES.map, (str, repr, json.dumps)))),
    st.builds(lambda key: f"--{key}", KEYS),
    GOOD.map(lambda pair: f"--{pair[0]}={pair[1]}"),
    GOOD.map(lambda pair: f"--{pair[0]}={pair[1]}"),
    TEXTS,
    st.sampled_from(NASTY),
)


@fixed(20_000)
@given(arguments=st.lists(OVERRIDES, min_size=1, max_size=3))
def arguments_of_commands(arguments: list[str]) -> None:
    with one_input():
        overrides = read_overrides(underscored(arguments), ["--model", "--data"], "train", takes_config=True)
        load(None, ["model.path=m", "data.train=rows.jsonl", "output_dir=x", *overrides])


load(None, ["model.path=m", "data.train=rows.jsonl", "output_dir=x"])
