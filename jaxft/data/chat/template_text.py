"""The text of a chat template: which variables it reads, and values that are fixed in it.

A run fixes the date and the variables that its template would take from outside, by a few lines before the template's
own text. Every program that renders the text, on whatever day, then writes what the run was trained on; a variable
that is given explicitly still wins.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ConfigError, did_you_mean

CLOCK = "strftime_now"  # transformers' function for the current date, in a format of Python's strftime
# What rendering itself gives to a template, so that nobody else may.
RESERVED = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize")
_DATE = re.compile(r"\{#- The date of training, [^#]*: (\d{4}-\d\d-\d\d)\. -#\}[^\n]*\n")
_DEFAULT = re.compile(r"\{%- if \w+ is not defined %\}\{% set \w+ = [^\n]* %\}\{% endif %\}\n")


@dataclass(frozen=True, kw_only=True)
class Reads:
    """What a template takes from outside.

    variables: their names, without those that the template itself always sets. formats: of the current date, those
    that are written in quotes. computed_format: whether it asks for the date in any other way. random: what gives
    another text at every rendering, or None.
    """

    variables: frozenset[str]
    formats: tuple[str, ...]
    computed_format: bool
    random: str | None


@functools.lru_cache(maxsize=64)
def reads_of(template: str) -> Reads:
    """What a template takes from outside; nothing, if it is not Jinja, which rendering says better."""
    from jinja2 import TemplateError, meta, nodes
    from jinja2.ext import Extension

    from jaxft.data.chat.budget import budget_for
    from jaxft.data.chat.sandbox import CountingEnvironment

    class Marks(Extension):
        """The tags around trained text that transformers knows; what is within them is read as if they were absent."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = CountingEnvironment()
    for name in (CLOCK, "raise_exception"):
        del environment.globals[name]  # else it would not count as read
    environment.add_extension(Marks)  # in the place of the one that would hide what is set within the tags
    try:
        with budget_for():  # Jinja computes constants on the way
            tree = environment.parse(template)
            names = meta.find_undeclared_variables(tree)
    except (TemplateError, RecursionError):
        return Reads(variables=frozenset(), formats=(), computed_format=False, random=None)
    optional = ("defined", "undefined", "default", "d")  # tests and filters for what may not be given
    tested = {
        one.node.name
        for one in tree.find_all((nodes.Test, nodes.Filter))
        if one.name in optional and isinstance(one.node, nodes.Name)
    }
    set_here = {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"}
    formats = []
    for call in tree.find_all(nodes.Call):
        given = [*call.args, *(one.value for one in call.kwargs)]
        if getattr(call.node, "name", None) == CLOCK and len(given) == 1 and isinstance(given[0], nodes.Const):
            formats.append(str(given[0].value))
    uses = [name for name in tree.find_all(nodes.Name) if name.name == CLOCK and name.ctx == "load"]
    known = [test for test in tree.find_all(nodes.Test) if getattr(test.node, "name", None) == CLOCK]
    random = "the filter random" if any(one.name == "random" for one in tree.find_all(nodes.Filter)) else None
    if any(name.name == "lipsum" for name in tree.find_all(nodes.Name)):
        random = "lipsum"
    return Reads(
        variables=frozenset(names - (set_here - tested) - environment.globals.keys() - {CLOCK, "raise_exception"}),
        formats=tuple(dict.fromkeys(formats)) if CLOCK in names else (),
        computed_format=CLOCK in names and len(uses) > len(formats) + len(known),
        random=random,
    )


def today() -> str:
    """Today's date, such as 2026-11-29, where this machine is."""
    return datetime.date.today().isoformat()


def with_date(template: str, date: str) -> str:
    """The template with the current date fixed, if it reads the clock; a date that is fixed already stays.

    date: such as 2026-11-29. Raises ConfigError if the template computes the format in which it wants the date.
    """
    reads = reads_of(template)
    if reads.computed_format:
        raise ConfigError(
            f"the chat template asks {CLOCK} for the date in a format that is not a text in quotes, so the date cannot "
            "be fixed, and rendering would change from day to day. Set data.chat_template to a copy of the template "
            f"that calls {CLOCK} with a text in quotes, or that has the date written in it."
        )
    if not reads.formats:
        return template
    midnight = datetime.datetime.fromisoformat(date)
    texts = ", ".join(f"{_literal(form)}: {_literal(midnight.strftime(form))}" for form in reads.formats)
    return (
        f"{{#- The date of training, in the place of today's: {date}. -#}}{{%- macro {CLOCK}(format) -%}}"
        f"{{{{- {{{texts}}}[format] -}}}}{{%- endmacro %}}\n{template}"
    )


def date_in(template: str | None) -> str | None:
    """The date that `with_date` fixed in a template, such as 2026-11-29; None if there is none."""
    line = _DATE.search(template or "")
    return line and line[1]


def with_defaults(template: str, values: Mapping[str, Any]) -> str:
    """The template with values for variables that are not given when it is rendered."""
    lines = [
        f"{{%- if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}\n"
        for name, value in values.items()
    ]
    return "".join(lines) + template


def own_text(template: str) -> str:
    """The template without the lines that `with_date` and `with_defaults` put before it."""
    while line := _DATE.match(template) or _DEFAULT.match(template):
        template = template[line.end() :]
    return template


def unread(names: Mapping[str, Any], known: frozenset[str]) -> str | None:
    """What is wrong with variables that are given to a template, as the end of a sentence; None if nothing is.

    known: the variables that the template reads.
    """
    taken = sorted(set(names) & set(RESERVED))
    if taken:
        return f"{taken[0]!r} is what every rendering gives itself."
    free = sorted(name for name in known - set(RESERVED) if not name.endswith("_token"))
    for name in names:
        if name not in known:
            others = f"It reads {', '.join(free)}." if free else "It reads none."
            return f"the chat template reads no variable {name!r}.{did_you_mean(name, free)} {others}"
    return None


def _literal(value: Any) -> str:
    """A value as Jinja writes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_literal(str(key))}: {_literal(one)}' for key, one in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return repr(value)
