"""Config fields: each is declared once, and checks, documents and command-line options read the declaration.

A section is a frozen dataclass. The annotation of a field holds all that is known about it:

    learning_rate: Annotated[float, ABOVE_ZERO, "the peak learning rate, reached at the end of warm-up"] = 2e-4

The text is the field's meaning. A `Literal` type lists its choices, a `Spelling` describes choices with a number in
them, a `Range` limits a number, and a `ReadBy` names the field that it depends on. `CHOOSES_SECTION` marks a field
whose value is the name of the nested section that is read. `FREE_TO_CHANGE` marks a field, or a whole section, that
may differ when a run is resumed. `BY_CONTENT` marks a field that names a file or a model, or a part of one: when a run
is resumed it may be spelt otherwise, but what it names must hold the same. `PATH` marks the path of a file or folder,
in which `~` is the home folder.
"""

import dataclasses
import difflib
import functools
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from jaxft.config.peer_names import correspondence
from jaxft.errors import ConfigError, did_you_mean
from jaxft.home import local_path

S = TypeVar("S", bound="Section")
LARGEST = 2**63 - 1  # whole number that arrays hold
TYPES = {
    bool: "True or False", int: "a whole number", float: "a number", str: "text", dict: "an object of names and values",
}  # fmt: skip


@dataclass(frozen=True)
class Range:
    """The numbers that a field takes. words: completes "must be", as in "above zero"."""

    fits: Callable[[float], bool]
    words: str


ABOVE_ZERO = Range(lambda value: value > 0, "above zero")
NOT_NEGATIVE = Range(lambda value: value >= 0, "zero or more")
BELOW_ONE = Range(lambda value: 0 <= value < 1, "at least 0 and below 1")
BETWEEN_ZERO_AND_ONE = Range(lambda value: 0 < value < 1, "above 0 and below 1")
ZERO_TO_ONE = Range(lambda value: 0 <= value <= 1, "from 0 to 1")


@dataclass(frozen=True)
class Spelling:
    """The texts that a field takes. pattern: a regular expression. words: the same for readers, with N for a number."""

    pattern: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class ReadBy:
    """The field is read only if the field `key` has one of `values`, or is set at all if there are none.

    because: a sentence for the error message. refuse: whether a value other than the default is an error if nothing
    reads it; False for fields that most configs fill, so that `key` can be overridden alone.
    """

    key: str
    values: tuple[str, ...] = ()
    because: str = ""
    refuse: bool = True

    @property
    def words(self) -> str:
        """The condition, as in "adapter.kind is 'lora' or 'vera'"."""
        return f"{self.key} is {_either(self.values)}" if self.values else f"{self.key} is set"

    def holds(self, value: object) -> bool:
        """Whether the field is read if `key` has this value."""
        return value in self.values if self.values else value not in (None, False, "", {})


@dataclass(frozen=True)
class Mark:
    """A property that a field has or has not."""

    name: str


CHOOSES_SECTION, FREE_TO_CHANGE = Mark("chooses section"), Mark("free to change")
BY_CONTENT, PATH = Mark("compared by content"), Mark("path")
# Text that lists names, or `name:value` pairs, separated by commas; lists and mappings of a file are joined so.
COMMA_SEPARATED = Mark("comma separated")
# Text that is one path, or a JSON list of them, which a list of a file is written as.
JSON_LIST = Mark("JSON list")
NONE_WORDS = ("none", "null", "~", "")
TRUE_WORDS, FALSE_WORDS = ("true", "yes", "on", "t", "1"), ("false", "no", "off", "f", "0")


class Section:
    """Base of all sections: a group of fields, and of sections, in one dataclass."""

    def check(self) -> None:
        """Raises ConfigError if fields of this section contradict each other. Each has been checked alone before."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """What is known about one field.

    key: its dotted name; fields of `dict[str, Section]` have NAME in it for the names that users give. base: bool, int,
    float, str, dict for values or sections under names of the user's own, or a Section class. optional: whether it
    takes None.
    """

    key: str
    base: type
    optional: bool
    default: object
    meaning: str
    choices: tuple[str, ...] = ()
    spelling: Spelling | None = None
    ranges: tuple[Range, ...] = ()
    dependencies: tuple[ReadBy, ...] = ()
    free_to_change: bool = False
    by_content: bool = False
    is_path: bool = False
    chooses_section: bool = False
    comma_separated: bool = False
    json_list: bool = False
    sections: type[Section] | None = None

    @property
    def type_words(self) -> str:
        """The type of its values, None included, for error messages."""
        return TYPES[self.base] + (" or None" if self.optional else "")

    def check(self, value: object) -> None:
        """Raises ConfigError for a value that is none of the choices, outside of a range, or too large for arrays."""
        if value is None:
            return
        if self.is_path and "\0" in str(value):
            raise ConfigError(f"{self.key}={value!r} holds a zero byte, which no name of a file has")
        choices = self.choices
        if self.spelling and not re.fullmatch(self.spelling.pattern, str(value)):
            choices = self.spelling.words
        if choices and value not in choices:
            hint = did_you_mean(str(value), choices)
            raise ConfigError(f"{self.key}={value!r} is not one of {', '.join(choices)}.{hint}")
        for range_ in self.ranges:
            if not range_.fits(typing.cast(float, value)):
                raise ConfigError(f"{self.key}={value} must be {range_.words}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{self.key}={value} must be a number that is finite")
        if isinstance(value, int) and not -LARGEST - 1 <= value <= LARGEST:
            raise ConfigError(
                f"{self.key}={str(value)[:20]}... is beyond the whole numbers of 64 bits: give a smaller one"
            )

    def convert(self, value: object) -> object:
        """The value as the field stores it: whole numbers become float if it takes float, and paths lose their `~`.

        Raises ConfigError for a value of another type.
        """
        if value is None and self.optional:
            return None
        if self.comma_separated and isinstance(value, list | tuple | Mapping):
            pairs = value.items() if isinstance(value, Mapping) else [(one,) for one in value]
            return ",".join(":".join(map(str, pair)) for pair in pairs)
        if self.json_list and isinstance(value, list | tuple) and all(isinstance(one, str) for one in value):
            return json.dumps(value, ensure_ascii=False)
        if self.base is float and isinstance(value, int) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError as error:
                raise ConfigError(f"{self.key}={str(value)[:20]}... is beyond the numbers of 64 bits") from error
        if not isinstance(value, self.base) or (isinstance(value, bool) and self.base is not bool):
            raise ConfigError(f"{self.key}={value!r} must be {self.type_words}")
        return local_path(value) if self.is_path and isinstance(value, str) else value

    def parse(self, text: str) -> object:
        """The value that a text means, from a command line or a file without types: 1e-4, no, null, [q_proj, v_proj].

        Raises ConfigError for a text of another type.
        """
        word, refusal = text.strip().lower(), ConfigError(f"{self.key}={text} must be {self.type_words}")
        if self.choices and word in self.choices:
            return word
        if self.optional and word in NONE_WORDS:
            return None
        if self.base is bool and word in TRUE_WORDS + FALSE_WORDS:
            return word in TRUE_WORDS
        if self.base is str:
            if word in ("none", "null") and not self.choices:
                raise refusal
            return _without_brackets(text) if self.comma_separated else text
        try:
            number = float(text) if self.base in (int, float) else math.nan
        except ValueError:
            raise refusal from None
        if not math.isfinite(number) or (self.base is int and not number.is_integer()):
            raise refusal
        return self.base(number) if self.base is float or "e" in word or "." in word else int(text)


def _without_brackets(text: str) -> str:
    """`q_proj,v_proj` of `[q_proj, "v_proj"]`, the form of a list in Python and YAML; another text as it is."""
    inner = re.fullmatch(r"\s*\[(.*)\]\s*", text, re.DOTALL)
    return text if inner is None else ",".join(part.strip().strip("\"'") for part in inner[1].split(","))


def own_fields(cls: type[Section], prefix: str = "") -> tuple[Field, ...]:
    """The fields of a section class, nested sections among them, with `prefix` before their names."""
    return tuple(dataclasses.replace(field, key=prefix + field.key) for field in _declared(cls))


def all_fields(cls: type[Section], prefix: str = "") -> dict[str, Field]:
    """Every field that holds a value, by its dotted key, in the order of declaration."""
    return dict(_all_fields(typing.cast(Any, cls), prefix))


@functools.cache
def _all_fields(cls: Any, prefix: str) -> dict[str, Field]:
    return {field.key: field for field, _ in _walk(cls(), prefix, template=True)}


def field_values(section: Section, prefix: str = "") -> list[tuple[Field, Any]]:
    """Every field of a section and of those within it, with its value. NAME is replaced by the users' own names."""
    return list(_walk(section, prefix))


def choices(cls: type[Section], name: str) -> tuple[str, ...]:
    """The values that the field `name` of a section class takes. Raises KeyError if it has none to choose from."""
    values = {field.key: field.choices for field in _declared(cls)}[name]
    if not values:
        raise KeyError(f"{cls.__name__}.{name} has no list of choices")
    return values


def check_fields(config: Section) -> None:
    """Raises ConfigError for the first field with a forbidden value, or with a value that nothing reads."""
    fields = field_values(config)
    for field, value in fields:
        field.check(value)
    values = {field.key: value for field, value in fields}
    for field, value in fields:
        for dependency in field.dependencies:
            if dependency.refuse and value != field.default and not dependency.holds(values[dependency.key]):
                raise ConfigError(_unread(field, value, dependency, values))
    for section in _iterate_sections(config):
        section.check()


def build(cls: type[S], values: Mapping[str, Any]) -> S:
    """A section from nested plain values. Raises ConfigError for unknown keys and for values of another type."""
    return _build(cls, values, "", cls)


def unknown_key(key: str, cls: type[Section]) -> str:
    """The error message for a key that the fields of `cls` do not have, with the nearest one that exists."""
    fields = list(all_fields(cls))
    sections = {name.rpartition(".")[0] for name in fields} - {""}
    keys = {name: name.rpartition(".")[2] for name in (*fields, *sorted(sections))}
    section, _, leaf = key.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in fields if name.rpartition(".")[0] == section}
    if section and (near := difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6)):
        return f"unknown config key {key!r}. Did you mean {siblings[near[0]]!r}?"
    if (other := correspondence(leaf)) is not None:
        return f"unknown config key {key!r}: {other}"
    same = [name for name, own in keys.items() if own == leaf]
    hint = "" if same else did_you_mean(key, fields)
    if not same and ("." not in key or not hint):
        # By the field's own name: the section was left out, or is the wrong one.
        near = difflib.get_close_matches(leaf, set(keys.values()), n=1, cutoff=0.6)
        same = [name for name, own in keys.items() if own in near]
    hint = f" Did you mean {_either(same)}?" if same else hint
    return f"unknown config key {key!r}.{hint}"


def as_mapping(value: object, key: str) -> Mapping[str, Any]:
    """The values of a section. Raises ConfigError for a value that is not a mapping."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"config key {key!r} is a section: set its fields one by one, instead of all to {value!r}")
    return value


def _declared(cls: type[Section]) -> tuple[Field, ...]:
    return _declarations(typing.cast(Any, cls))


@functools.cache
def _declarations(cls: Any) -> tuple[Field, ...]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return tuple(_declaration(spec, hints[spec.name]) for spec in dataclasses.fields(cls))


def _declaration(spec: "dataclasses.Field[Any]", hint: Any) -> Field:
    hint, *notes = (hint.__origin__, *hint.__metadata__) if typing.get_origin(hint) is typing.Annotated else (hint,)
    optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
    if optional:
        (hint,) = (kind for kind in typing.get_args(hint) if kind is not type(None))
    literal, mapping = typing.get_origin(hint) is Literal, typing.get_origin(hint) is dict
    named = typing.get_args(hint)[1] if mapping else None
    has_default = spec.default is not dataclasses.MISSING
    return Field(
        key=spec.name,
        base=str if literal else dict if mapping else hint,
        optional=optional,
        default=spec.default if has_default else typing.cast(Any, spec.default_factory)(),
        meaning=" ".join(note for note in notes if isinstance(note, str)),
        choices=typing.get_args(hint) if literal else (),
        spelling=next((note for note in notes if isinstance(note, Spelling)), None),
        ranges=tuple(note for note in notes if isinstance(note, Range)),
        dependencies=tuple(note for note in notes if isinstance(note, ReadBy)),
        free_to_change=FREE_TO_CHANGE in notes,
        by_content=BY_CONTENT in notes,
        is_path=PATH in notes,
        chooses_section=CHOOSES_SECTION in notes,
        comma_separated=COMMA_SEPARATED in notes,
        json_list=JSON_LIST in notes,
        sections=named if isinstance(named, type) and issubclass(named, Section) else None,
    )


def _walk(section: Section, prefix: str, *, template: bool = False) -> Iterator[tuple[Field, Any]]:
    """Fields with their values. template: show one section called NAME where users give names, instead of theirs."""
    fields = own_fields(type(section), prefix)
    chooser = next((field.key for field in fields if field.chooses_section), None)
    for field in fields:
        name = field.key.removeprefix(prefix)
        value: Any = getattr(section, name)
        if isinstance(value, Section):
            chosen = (ReadBy(chooser, (name,)),) if chooser else ()
            for inner, own in _walk(value, f"{field.key}.", template=template):
                free = inner.free_to_change or field.free_to_change
                yield dataclasses.replace(inner, dependencies=chosen + inner.dependencies, free_to_change=free), own
            continue
        yield field, value
        if field.sections is not None:
            for entry, nested in ({"NAME": field.sections()} if template else value).items():
                yield from _walk(nested, f"{field.key}.{entry}.", template=template)


def _iterate_sections(section: Section) -> Iterator[Section]:
    """The sections within a section, innermost first, then the section itself."""
    for field in _declared(type(section)):
        value: Any = getattr(section, field.key)
        nested: Iterable[Any] = value.values() if field.sections is not None else (value,)
        for inner in nested:
            if isinstance(inner, Section):
                yield from _iterate_sections(inner)
    yield section


def _build(cls: type[S], values: Mapping[str, Any], prefix: str, root: type[Section]) -> S:
    fields = {field.key.removeprefix(prefix): field for field in own_fields(cls, prefix)}
    for name in values:
        if name not in fields:
            raise ConfigError(unknown_key(prefix + name, root))
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        field = fields[name]
        if issubclass(field.base, Section):
            arguments[name] = _build(field.base, as_mapping(value, field.key), f"{field.key}.", root)
        elif field.sections:
            arguments[name] = {
                entry: _build(field.sections, as_mapping(inner, f"{field.key}.{entry}"), f"{field.key}.{entry}.", root)
                for entry, inner in as_mapping(value, field.key).items()
            }
        else:
            arguments[name] = field.convert(value)
    return cls(**arguments)


def _unread(field: Field, value: object, dependency: ReadBy, values: Mapping[str, object]) -> str:
    actual = f"{dependency.key}={values[dependency.key]!r}" if dependency.values else "it is not"
    because = f" {dependency.because}" if dependency.because else ""
    few = f" to {_either(dependency.values)}" if 0 < len(dependency.values) < 3 else ""
    other = f"set {dependency.key}{few or (' to one of those' if dependency.values else '')}"
    # A chooser's sections may all have a field of this name: show the one that is read.
    section, _, leaf = field.key.rpartition(".")
    twin = f"{section.rpartition('.')[0]}.{values[dependency.key]}.{leaf}"
    read = f" With {actual}, {twin} is read." if dependency.values and twin in values and twin != field.key else ""
    return (
        f"{field.key}={value!r} is read only if {dependency.words}, but {actual}.{because} Set {field.key} to "
        f"{field.default!r}, or {other}.{read}"
    )


def _either(names: Iterable[str]) -> str:
    *most, last = (repr(name) for name in names)
    return f"{', '.join(most)} or {last}" if most else last
