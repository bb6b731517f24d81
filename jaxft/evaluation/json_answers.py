"""Answers that are JSON: whether they are valid, fit a schema, and have the fields of the reference right."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxft.errors import ConfigError
from jaxft.evaluation.statistics import wilson_interval
from jaxft.files.strict_json import parse_json
from jaxft.home import local_path


def parse(text: str) -> Any:
    """The value of strict JSON text: no NaN, no key twice. Raises ValueError, or RecursionError if it is too deep."""
    return parse_json(text.strip(), finite=True)


def not_json(text: str) -> str | None:
    """Why a text is not strict JSON; None if it is."""
    try:
        parse(text)
    except (ValueError, RecursionError) as error:
        return str(error)
    return None


def is_json(text: str) -> bool:
    """Whether a text is one strict JSON value."""
    return not_json(text) is None


def object_or_empty(text: str) -> dict[str, Any]:
    """The JSON object in a text; an empty one if it is none."""
    value = parse(text) if is_json(text) else None
    return value if isinstance(value, dict) else {}


def equal(a: Any, b: Any) -> bool:
    """Equality of JSON values: in Python True == 1, in JSON true is not 1."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@dataclass(frozen=True, kw_only=True)
class Schema:
    """A JSON Schema. source: its file. value: its content."""

    source: str
    value: Mapping[str, Any]

    @property
    def properties(self) -> tuple[str, ...]:
        """The names of the properties of its object, in order; none if it does not list them."""
        properties = self.value.get("properties")
        return tuple(properties) if isinstance(properties, Mapping) else ()

    def problem(self, text: str) -> str | None:
        """Why a text is no JSON that fits the schema; None if it is.

        Raises ConfigError if the schema refers to what it does not hold, or to itself without end.
        """
        from jsonschema.validators import validator_for
        from jsonschema_specifications import REGISTRY
        from referencing.exceptions import Unresolvable

        if (problem := not_json(text)) is not None:
            return f"is not JSON ({problem})"
        try:
            # With a registry of its own nothing is fetched from the network.
            validator = validator_for(self.value)(self.value, registry=REGISTRY)
            error = next(iter(validator.iter_errors(parse(text))), None)
        except Unresolvable as wrong:
            raise ConfigError(_refers(self.source, wrong.ref)) from wrong
        except RecursionError as wrong:
            raise ConfigError(f"eval.schema={self.source!r} refers to itself without end: see its $ref") from wrong
        return None if error is None else f"does not fit {self.source}: {error.message[:200]}"


def load_schema(path: str) -> Schema:
    """The JSON Schema in a file.

    Raises ConfigError if it cannot be read, is none, asks for nothing, refers to what it does not hold, or if
    jsonschema is not installed.
    """
    try:
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import validator_for
    except ImportError as error:
        raise ConfigError("eval.schema needs the library jsonschema: pip install 'jaxft[metrics]'") from error
    source = local_path(path)
    try:
        with open(source, "rb") as file:
            value = parse_json(file.read())
        if not isinstance(value, dict):
            raise ConfigError(f"eval.schema={path!r} is no JSON Schema: it holds a {type(value).__name__}, no object")
        kind = validator_for(value)
        kind.check_schema(value)
    except (OSError, ValueError) as error:
        raise ConfigError(f"eval.schema={path!r} cannot be read: {error}") from error
    except SchemaError as error:
        raise ConfigError(f"eval.schema={path!r} is no JSON Schema: {error.message}") from error
    if not any(key in kind.VALIDATORS for key in value):
        raise ConfigError(
            f"eval.schema={path!r} asks for nothing, so that any JSON would fit: none of its keys "
            f"({', '.join(value) or 'it has none'}) is a keyword of JSON Schema. An answer is no schema; one is such "
            'as {"type": "object", "required": ["intent"], "properties": {"intent": {"enum": ["yes", "no"]}}}'
        )
    if (reference := _missing_reference(value)) is not None:
        raise ConfigError(_refers(path, reference))
    return Schema(source=source, value=value)


def _refers(source: str, reference: str) -> str:
    return (
        f"eval.schema={source!r} refers to {reference!r}, which it does not hold: write that part into its $defs, "
        "since no other file or address is read"
    )


def _missing_reference(schema: Mapping[str, Any]) -> str | None:
    """The first `$ref` to what a schema does not hold, or None; parts that have an `$id` of their own hide it."""
    from jsonschema_specifications import REGISTRY
    from referencing import Resource
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    resolver = REGISTRY.resolver_with_root(Resource.from_contents(schema, default_specification=DRAFT202012))
    parts = list(_parts(schema))
    if any("$id" in part for part in parts[1:]):
        return None
    for reference in (part["$ref"] for part in parts if isinstance(part.get("$ref"), str)):
        try:
            resolver.lookup(reference)
        except Unresolvable:
            return str(reference)
    return None


def _parts(value: Any) -> Iterator[Mapping[str, Any]]:
    """The objects in a schema, itself first, without those that are data."""
    if isinstance(value, Mapping):
        yield value
        for key, part in value.items():
            yield from () if key in ("enum", "const", "default", "examples") else _parts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _parts(part)


@dataclass(frozen=True, kw_only=True)
class RowFields:
    """The fields of one row that are compared, and those of them that the answer has right."""

    keys: tuple[str, ...]
    right: tuple[str, ...]


def row_fields(answer: str, reference: str, schema: Schema | None = None) -> RowFields:
    """The keys of the reference's object, or the properties of the schema, and those with the same value in both.

    A property that neither has is right. An answer that is not a JSON object has no field right.
    """
    expected = object_or_empty(reference)
    keys = schema.properties if schema is not None and schema.properties else tuple(expected)
    if not expected or not is_json(answer) or not isinstance(parse(answer), dict):
        return RowFields(keys=keys if expected else (), right=())
    given = parse(answer)

    def is_right(key: str) -> bool:
        both = key in given and key in expected
        return equal(given[key], expected[key]) if both else key not in given and key not in expected

    return RowFields(keys=keys, right=tuple(filter(is_right, keys)))


@dataclass
class FieldCounts:
    """For each field, in the order of its first appearance, the rows that have it and those that have it right."""

    total: dict[str, int] = field(default_factory=dict)
    right: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, answers: Sequence[str], references: Sequence[str], schema: Schema | None = None) -> "FieldCounts":
        """The counts of rows, each an answer and the reference of the same row."""
        counts = cls()
        for answer, reference in zip(answers, references, strict=True):
            row = row_fields(answer, reference, schema)
            for key in row.keys:
                counts.total[key] = counts.total.get(key, 0) + 1
                counts.right[key] = counts.right.get(key, 0) + (key in row.right)
        return counts

    def shares(self) -> dict[str, float]:
        """The share of the rows with a field that have it right."""
        return {key: self.right[key] / total for key, total in self.total.items()}

    def summary(self) -> dict[str, Any]:
        """`fields`, their shares, and `field_intervals`, Wilson's of 95%; nothing if there is no field."""
        if not self.total:
            return {}
        intervals = {key: list(wilson_interval(self.right[key], total)) for key, total in self.total.items()}
        return {"fields": self.shares(), "field_intervals": intervals}
