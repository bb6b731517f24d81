"""Chat templates compiled so that they count what they do: Jinja's sandbox, with a budget.

Loops, macros and blocks count their turns; operators, methods and filters count what they are about to make. A template
that stays within its budget writes what transformers' own environment writes.
"""

import functools
import json
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from jaxft.data.chat import growth
from jaxft.data.chat.budget import BudgetExceeded, active, charge_size, charge_value, is_limited

MAX_TEMPLATE = 1_000_000  # characters; the largest in use has about 30,000


@functools.lru_cache(maxsize=64)
def compiled(template: str) -> Template:
    """A chat template, ready to be rendered within `budget_for`. Raises TemplateError for text that is not Jinja."""
    if len(template) > MAX_TEMPLATE:
        raise BudgetExceeded(f"its text has {len(template):,} characters, and at most {MAX_TEMPLATE:,} are read")
    return CountingEnvironment().from_string(template)


def limit_transformers() -> None:
    """Has transformers compile templates by `compiled` within `budget_for`, and as ever elsewhere.

    transformers selects the template of a conversation and prepares its messages, which differs between its versions.
    """
    from transformers.utils import chat_template_utils

    original: Callable[[str], Template] = chat_template_utils._compile_jinja_template
    if getattr(original, "counts", False):
        return

    def compile_template(template: str) -> Template:
        return compiled(template) if is_limited() else original(template)

    compile_template.counts = True  # type: ignore[attr-defined]
    chat_template_utils._compile_jinja_template = compile_template


class CountingEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox in which transformers renders chat templates, with a budget for what they do."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationMarks, loopcontrols], finalize=charge_value
        )
        self.globals |= {
            "raise_exception": _raise, "strftime_now": _now, "dict": _Dict(), "namespace": _Namespace,
        }  # fmt: skip
        del self.globals["lipsum"]
        self.filters["tojson"] = _to_json
        self.filters = growth.limited_filters(self.filters)
        self.filters |= {
            TURN: growth.count_turn,
            JOIN: growth.join_text,
            SLICE: growth.take_slice,
            SUM: growth.add_values,
            LITERAL: growth.count_literal,
        }

    def _generate(self, source: nodes.Template, name: Any, filename: Any, defer_init: bool = False) -> str:
        return super()._generate(_Counting().visit(source), name, filename, defer_init)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator, whose result is counted."""
        if operator == "*":
            growth.check_product(left, right)
        elif operator == "%":
            growth.check_percent(left, right)
        else:
            growth.check_power(left, right)
        return self.binop_table[operator](left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of a method, a macro or a function, which is counted."""
        budget = active()
        budget.step()
        owner = getattr(__obj, "__self__", None)
        if owner is not None:
            args = growth.check_method(owner, getattr(__obj, "__name__", ""), args, kwargs)
        elif (form := getattr(__obj, "__wrapped__", None)) is not None:  # the sandbox's own str.format
            growth.charge_format(form.__self__, (*args, *kwargs.values()))
        for one in args:
            if type(one) is not str and isinstance(one, list | tuple | dict | Namespace):
                charge_size(one)
        if kwargs:
            charge_size([one for name, one in kwargs.items() if name not in ("_loop_vars", "_block_vars")])
        return super().call(__context, __obj, *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`obj.attribute`: of an object of JSON its field, without the detour over Python's own attributes."""
        if type(obj) is dict and attribute not in _DICT_NAMES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`obj[argument]`, in the same way."""
        if type(obj) is dict and type(argument) is str and argument not in _DICT_NAMES:
            return obj[argument] if argument in obj else self.undefined(obj=obj, name=argument)
        return super().getitem(obj, argument)


TURN, JOIN, SLICE, SUM, LITERAL = "count_turn", "join_text", "take_slice", "add_values", "count_literal"
_DICT_NAMES = frozenset(dir(dict))
SUMMANDS = 16  # of an expression that is written at once, so that a sum need not be counted before it is written


class _Counting(NodeTransformer):
    """Has loops, macros and blocks count, and puts filters that count in the place of some operators."""

    _plain_sums = False

    def visit_For(self, node: nodes.For, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node)
        if node.test is not None:  # it may be false for all of a long list, whose body is then never entered
            node.test = nodes.And(_filter(TURN, nodes.Const(0)), node.test, lineno=node.lineno)
        return _counted(node)

    def visit_Macro(self, node: nodes.Macro, *args: Any, **kwargs: Any) -> nodes.Node:
        return _counted(self.generic_visit(node))

    def visit_CallBlock(self, node: nodes.CallBlock, *args: Any, **kwargs: Any) -> nodes.Node:
        return _counted(self.generic_visit(node))

    def visit_Block(self, node: nodes.Block, *args: Any, **kwargs: Any) -> nodes.Node:
        return _counted(self.generic_visit(node))

    def visit_Output(self, node: nodes.Output, *args: Any, **kwargs: Any) -> nodes.Node:
        for index, written in enumerate(node.nodes):
            summands = sum(1 for _ in written.find_all(nodes.Add))
            if summands <= SUMMANDS:
                self._plain_sums = True
            node.nodes[index] = self.visit(written)
            self._plain_sums = False
        return node

    def visit_Add(self, node: nodes.Add, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node)
        return node if self._plain_sums else _filter(SUM, node.left, node.right)

    def visit_Concat(self, node: nodes.Concat, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node)
        return _filter(JOIN, *node.nodes)

    def visit_Getitem(self, node: nodes.Getitem, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        cut = (part or nodes.Const(None) for part in (node.arg.start, node.arg.stop, node.arg.step))
        return _filter(SLICE, node.node, *cut)

    def visit_List(self, node: nodes.List, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node)
        return node if _is_constant(node.items) else _filter(LITERAL, node)

    def visit_Tuple(self, node: nodes.Tuple, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node)
        return node if node.ctx != "load" or _is_constant(node.items) else _filter(LITERAL, node)

    def visit_Dict(self, node: nodes.Dict, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node)
        return node if _is_constant(pair.value for pair in node.items) else _filter(LITERAL, node)


class GenerationMarks(Extension):
    """The tags around trained text that transformers knows; what is between them is written as it is."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.CallBlock:
        """The block between the tags."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.CallBlock(self.call_method("_written"), [], [], body)
        block.set_lineno(line)
        return block

    def _written(self, caller: Callable[[], str]) -> str:
        return caller()


def _filter(name: str, first: nodes.Expr, *others: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(first, name, list(others), [], None, None, lineno=first.lineno or 1)


def _counted(node: Any) -> nodes.Node:
    """A loop, macro or block with a first statement that counts, and the characters of text that it writes itself."""
    node.body.insert(0, nodes.ExprStmt(_filter(TURN, nodes.Const(_own_text(node.body))), lineno=node.lineno))
    return node


def _own_text(body: Iterable[nodes.Node]) -> int:
    """The characters of the longest way through statements; loops and blocks within them count their own."""
    size = 0
    for one in body:
        if isinstance(one, nodes.Output):
            size += sum(len(text.data) for text in one.nodes if isinstance(text, nodes.TemplateData))
        elif isinstance(one, nodes.If):
            branches = [one.body, *(other.body for other in one.elif_), one.else_]
            size += max(map(_own_text, branches))
        elif not isinstance(one, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block):
            size += _own_text(getattr(one, "body", ()))
    return size


def _is_constant(items: Iterable[nodes.Expr]) -> bool:
    return all(isinstance(item, nodes.Const) for item in items)


class _Dict:
    """`dict` for templates, of which only calls can be made."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """An object with these names."""
        active().charge(len(list(args[0])) if args and not hasattr(args[0], "__next__") else 0)
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` for templates: without names of Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *values = args
        attributes = dict(*values, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(
            f"a namespace of a chat template has no attribute {name!r}, which begins with an underscore"
        )


def _raise(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _now(format: str) -> str:
    growth.check_percent(format.replace("*", ""), ())
    return datetime.now().strftime(format)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
