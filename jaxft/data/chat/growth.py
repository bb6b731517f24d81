"""What operators, methods and filters of a template make, estimated from their operands before they are computed."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2 import pass_context

from jaxft.data.chat.budget import INTEGER_BITS, Budget, BudgetExceeded, active, charge_value, size_of

PRECISION = 400  # digits of a rounded number; a float has 17
# Filters for pages and debugging, whose work grows faster than their input.
ABSENT = ("pprint", "striptags", "urlize", "xmlattr")
# Filters that look at a value or take one item of it.
CHEAP = ("attr", "count", "d", "default", "first", "last", "length")
# Filters that pass the items of a list on, without writing them.
SHALLOW = (
    "batch", "dictsort", "groupby", "items", "list", "map", "max", "min", "reject", "rejectattr", "reverse", "select",
    "selectattr", "slice", "sort", "sum", "unique",
)  # fmt: skip
# Methods of texts whose result may be longer than three times the text.
GROWING = frozenset(
    ("center", "expandtabs", "format", "format_map", "join", "ljust", "replace", "rjust", "translate", "zfill")
)
_NUMBER = re.compile(r"\d+")


def check_product(left: Any, right: Any) -> None:
    """Counts `left * right`."""
    for repeated, times in ((left, right), (right, left)):
        if isinstance(repeated, str | bytes | list | tuple) and isinstance(times, int):
            active().charge(len(repeated) * max(0, times))
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())


def check_power(base: Any, exponent: Any) -> None:
    """Counts `base ** exponent`."""
    if isinstance(base, int) and isinstance(exponent, int) and exponent > 0:
        _check_bits(base.bit_length() * exponent)


def check_percent(left: Any, right: Any) -> None:
    """Counts `left % right`, which fills a text if `left` is one."""
    if isinstance(left, str | bytes):
        form = left if isinstance(left, str) else left.decode("latin-1")
        values = (
            right if isinstance(right, tuple) else tuple(right.values()) if isinstance(right, Mapping) else (right,)
        )
        _charge_form(form, form.count("%"), values, widths_are_values="*" in form)


@pass_context
def add_values(context: Any, left: Any, right: Any) -> Any:
    """`left + right`, which is no longer than both."""
    value = left + right
    kind = type(value)
    if kind is str or isinstance(value, str | bytes | list | tuple):
        active().charge(len(value))
    elif kind is int:
        _check_bits(value.bit_length())
    return value


def check_method(owner: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Counts what a method of a text, number or container makes. Returns its arguments, iterators as lists."""
    budget = active()
    if isinstance(owner, str | bytes):
        budget.charge(3 * len(owner))
        if name not in GROWING:
            return args
        if name in ("center", "ljust", "rjust", "zfill"):
            budget.charge(_integer(args, 0))
        elif name == "expandtabs":
            tab = kwargs.get("tabsize", args[0] if args else 8)
            budget.charge(len(owner) * max(0, int(tab)))
        elif name == "join" and args:
            pieces = list(args[0])
            budget.charge(len(owner) * len(pieces) + size_of(pieces, budget.characters))
            return (pieces, *args[1:])
        elif name == "replace" and len(args) > 1:
            _charge_replacement(budget, owner, args[0], args[1])
        elif name == "translate" and args:
            values = args[0].values() if isinstance(args[0], Mapping) else args[0]
            budget.charge(len(owner) * max((len(one) for one in values if isinstance(one, str)), default=1))
        elif name in ("format", "format_map"):
            charge_format(str(owner), (*args, *kwargs.values()))
    elif isinstance(owner, int) and name == "to_bytes":
        budget.charge(kwargs.get("length", _integer(args, 0)))
    elif isinstance(owner, list | tuple | Mapping):
        budget.charge(len(owner))
    return args


def charge_format(form: str, values: Iterable[Any]) -> None:
    """Counts `form.format(*values)`."""
    inner = tuple(one for value in values for one in (value.values() if isinstance(value, Mapping) else (value,)))
    _charge_form(form, form.count("{"), inner, widths_are_values=re.search(r":[^{}]*\{", form) is not None)


def limited_filters(filters: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The filters of Jinja, each of which counts before it computes."""
    return {
        name: compute if name in CHEAP else _limited(name, compute)
        for name, compute in filters.items()
        if name not in ABSENT
    }


def _limited(name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
    # Some filters take the environment or the context before the value.
    first = 0 if getattr(compute, "jinja_pass_arg", None) is None else 1
    check = _FILTERS.get(name)

    @functools.wraps(compute)
    def limited(*args: Any, **kwargs: Any) -> Any:
        budget = active()
        budget.step()
        given = args[first:]
        if check is not None:
            given = check(budget, *given, **kwargs) or given
        elif name in SHALLOW:
            budget.charge(_length(given[0]))
        else:
            for one in (*given, *kwargs.values()):
                charge_value(one)
        return compute(*args[:first], *given, **kwargs)

    return limited


def _join(budget: Budget, value: Any, d: Any = "", attribute: Any = None) -> tuple[Any, ...]:
    pieces = list(value)
    budget.charge(size_of(pieces, budget.characters) + len(pieces) * len(str(d)))
    return (pieces, d, attribute)


def _replacement(budget: Budget, text: Any, old: Any, new: Any, count: Any = None) -> None:
    charge_value(text)
    _charge_replacement(budget, str(text), str(old), str(new))


def _indent(budget: Budget, text: Any, width: Any = 4, first: Any = False, blank: Any = False) -> None:
    charge_value(text)
    budget.charge((str(text).count("\n") + 1) * (width if isinstance(width, int) else len(str(width))))


def _wordwrap(
    budget: Budget, text: Any, width: Any = 79, break_long_words: Any = True, wrapstring: Any = None, **_: Any
) -> None:
    charge_value(text)
    length = len(str(text))
    budget.charge(
        length + (length // max(1, int(width)) + str(text).count("\n") + 1) * len(str(wrapstring or "\n")) * 2
    )


def _width(budget: Budget, text: Any, width: Any = 80) -> None:
    charge_value(text)
    budget.charge(int(width))


def _count(budget: Budget, value: Any, count: Any = 1, *_: Any, **__: Any) -> None:
    budget.charge(_length(value) + abs(int(count)))


def _batch(budget: Budget, value: Any, linecount: Any = 1, fill_with: Any = None) -> None:
    _count(budget, value, linecount)


def _slice(budget: Budget, value: Any, slices: Any = 1, fill_with: Any = None) -> None:
    _count(budget, value, slices)


def _round(budget: Budget, value: Any, precision: Any = 0, method: Any = "common") -> None:
    if abs(int(precision)) > PRECISION:
        raise BudgetExceeded(f"it rounds to {precision:,} digits")


def _format(budget: Budget, form: Any, *args: Any, **kwargs: Any) -> None:
    check_percent(str(form), args or kwargs)


def _json(
    budget: Budget,
    value: Any,
    ensure_ascii: Any = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: Any = False,
) -> None:
    size = size_of(value, budget.characters)
    budget.charge(size)
    if indent is not None or separators is not None:
        width = indent if isinstance(indent, int) else len(indent or "")
        budget.charge(size * (max(0, width) * _depth(value) + sum(len(str(one)) for one in separators or ())))


def _sum(budget: Budget, value: Any, attribute: Any = None, start: Any = 0) -> tuple[Any, ...]:
    items = list(value)
    # Lists are added one by one, each time into a new list.
    budget.charge(
        len(items) + (size_of(items, budget.characters) * len(items) if isinstance(start, list | tuple) else 0)
    )
    return (items, attribute, start)


def _truncate(
    budget: Budget, text: Any, length: Any = 255, killwords: Any = False, end: Any = "...", leeway: Any = None
) -> None:
    charge_value(text)
    charge_value(end)


_FILTERS: dict[str, Callable[..., Any]] = {
    "batch": _batch, "center": _width, "format": _format, "indent": _indent, "join": _join, "replace": _replacement,
    "round": _round, "slice": _slice, "sum": _sum, "tojson": _json, "truncate": _truncate, "wordwrap": _wordwrap,
}  # fmt: skip


@pass_context
def count_turn(context: Any, characters: int) -> bool:
    """Counts a turn of a loop or a call of a macro that writes so many characters of its own."""
    active().step(characters)
    return True


@pass_context
def join_text(context: Any, first: Any, *others: Any) -> str:
    """`first ~ others`."""
    budget = active()
    pieces = [str(charge_value(one)) for one in (first, *others)]
    budget.charge(sum(map(len, pieces)))
    return "".join(pieces)


@pass_context
def take_slice(context: Any, value: Any, start: Any, stop: Any, step: Any) -> Any:
    """`value[start:stop:step]`."""
    taken = value[start:stop:step]
    active().charge(_length(taken))
    return taken


@pass_context
def count_literal(context: Any, value: Any) -> Any:
    """Counts a list, tuple or object that a template writes down, with all that is in it."""
    return charge_value(value)


def _charge_form(form: str, fields: int, values: tuple[Any, ...], *, widths_are_values: bool) -> None:
    budget = active()
    largest = max((size_of(one, budget.characters) for one in values), default=0)
    widths = [int(number) for number in _NUMBER.findall(form)]
    if widths_are_values:
        widths += [abs(one) * fields for one in values if isinstance(one, int)]
    budget.charge(len(form) + fields * largest + sum(widths))


def _charge_replacement(budget: Budget, text: Any, old: Any, new: Any) -> None:
    count = text.count(old) if len(old) else len(text) + 1
    budget.charge(len(text) + count * len(new))


def _check_bits(bits: int) -> None:
    if bits > INTEGER_BITS:
        raise BudgetExceeded(f"it computes an integer of more than {INTEGER_BITS:,} bits")


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        inner = [
            list(one.values()) if isinstance(one, Mapping) else one
            for one in level
            if isinstance(one, Mapping | list | tuple)
        ]
        level = [item for one in inner for item in one]
    return depth


def _length(value: Any) -> int:
    try:
        return len(value)
    except TypeError:  # an iterator, whose items were counted where they come from
        return 1


def _integer(args: tuple[Any, ...], index: int) -> int:
    value = args[index] if len(args) > index else 0
    return max(0, value) if isinstance(value, int) else 0
