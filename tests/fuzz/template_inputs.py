"""Chat templates made by a grammar of Jinja, and mutations of the built-in ones, some of them hostile."""

from typing import Any

from fuzz.limits import one_input
from fuzz.values import NASTY, TEXTS, fixed
from hypothesis import given
from hypothesis import strategies as st

from jaxft.assets import ASSETS
from jaxft.config import DataConfig
from jaxft.data import load_tokenizer
from jaxft.data.chat.encode import encode_all
from jaxft.data.formats import read_row
from jaxft.data.tokenizers.templates import BUILT_IN, built_in

SMOKE = load_tokenizer(str(ASSETS / "smoke"))
ROWS = [
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>t</think>a"}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "tide?"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "tide", "arguments": {"at": [1, None, True]}}}]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "one", "reasoning_content": "t"},
        ],
        "tools": [{"name": "tide", "parameters": {"type": "object", "properties": {}}}],
    },
]
CONVERSATIONS = [read_row(row, DataConfig(), row=n, where=f"row {n}") for n, row in enumerate(ROWS)]
NAMES = [
    "messages", "m", "m.role", "m.content", "m['content']", "tools", "bos_token", "eos_token", "loop", "loop.index0",
    "loop.last", "add_generation_prompt", "none", "true", "x", "ns", "m.tool_calls", "enable_thinking", "documents",
    "messages[0]", "messages[-1].content", "range", "self", "cycler", "joiner", "lipsum", "dict", "strftime_now('%Y')",
    "raise_exception('no')", "().__class__", "''.__class__.__mro__", "m.__class__.__init__.__globals__", "x.__reduce__",
    "messages.append", "namespace(n=0)", "range(10 ** 9)", "'a' * 10 ** 10", "[0] * 10 ** 9", "10 ** 10 ** 7",
    "'%1000000000d' % 1", "'{:>1000000000}'.format(1)", "(1, 2) * 10 ** 9", "1 / 0", "-1e400", "'\\ud83d'",
]  # fmt: skip
FILTERS = [
    "tojson", "trim", "length", "string", "list", "join", "upper", "int", "float", "safe", "e", "first", "last", "sort",
    "map(attribute='role')", "selectattr('role', 'equalto', 'user')", "replace('a', 'aa')", "batch(3)", "dictsort",
    "center(10 ** 9)", "indent(10 ** 8)", "tojson(indent=10 ** 8)", "wordwrap(1)", "random", "attr('__class__')", "sum",
    "default('x', true)", "items", "groupby('role')", "truncate(3)", "urlize", "xmlattr", "pprint", "format", "round",
]  # fmt: skip
TESTS = ["defined", "string", "none", "mapping", "iterable", "equalto('user')", "divisibleby(0)", "in 'abc'", "nosuch"]
METHODS = ["split('a')", "strip()", "items()", "get('x')", "format(1)", "join([1])", "encode()", "pop()"]
TAGS = ["include 'x'", "import 'os' as x", "break", "continue", "do 1", "raw", "extends 'x'", "call f()"]
LITERALS = st.one_of(st.integers(-3, 10**6).map(str), TEXTS.map(repr), st.sampled_from(NASTY).map(repr))
EXPRESSIONS: Any = st.recursive(
    st.one_of(st.sampled_from(NAMES), st.sampled_from(NAMES), LITERALS),
    lambda inner: st.one_of(
        st.builds("({} | {})".format, inner, st.sampled_from(FILTERS)),
        st.builds("({} {} {})".format, inner, st.sampled_from("+ - * / // % ** ~ == < in and or".split()), inner),
        st.builds("({} is {})".format, inner, st.sampled_from(TESTS)),
        st.builds("{}[{}]".format, inner, inner),
        st.builds("({} if {} else {})".format, inner, inner, inner),
        st.builds("[{}, {}]".format, inner, inner),
        st.builds("{}({})".format, inner, inner),
        st.builds(
            "{}.{}".format, inner, st.sampled_from(["split('a')", "strip()", "items()", "get('x')", "format(1)"])
        ),
    ),
    max_leaves=6,
)
STATEMENTS: Any = st.recursive(
    st.one_of(TEXTS, EXPRESSIONS.map("{{{{ {} }}}}".format), st.just("<|im_start|>"), st.just("<|im_end|>")),
    lambda inner: st.one_of(
        st.builds("{{% for m in {} %}}{}{{% endfor %}}".format, EXPRESSIONS, inner),
        st.builds("{{% for m in messages %}}{}{{% endfor %}}".format, inner),
        st.builds("{{% if {} %}}{}{{% else %}}{}{{% endif %}}".format, EXPRESSIONS, inner, inner),
        st.builds("{{% set x = {} %}}{}".format, EXPRESSIONS, inner),
        st.builds("{{% macro f(x) %}}{}{{{{ f(x) }}}}{{% endmacro %}}{{{{ f(1) }}}}".format, inner),
        st.builds("{{% filter {} %}}{}{{% endfilter %}}".format, st.sampled_from(FILTERS), inner),
        st.builds("{{% generation %}}{}{{% endgeneration %}}".format, inner),
        st.builds(
            "{{% {} %}}{}".format, st.sampled_from(["include 'x'", "import 'os' as x", "break", "do 1", "raw"]), inner
        ),
        st.lists(inner, max_size=4).map("".join),
    ),
    max_leaves=6,
)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A built-in template with pieces put in, taken out or repeated."""
    text = built_in(draw(st.sampled_from(sorted(BUILT_IN))))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        end = min(len(text), at + draw(st.integers(0, 30)))
        text = text[:at] + draw(st.one_of(EXPRESSIONS, STATEMENTS, st.just(text[at:end] * 2), st.just(""))) + text[end:]
    return text


@fixed(2_000)
@given(template=st.one_of(STATEMENTS, mutated()), config=st.sampled_from([DataConfig(), DataConfig(omissions="warn")]))
def templates_of_any_kind(template: str, config: DataConfig) -> None:
    for conversation in CONVERSATIONS:
        with one_input():
            list(encode_all([conversation], SMOKE.with_template(template), config))


list(encode_all(CONVERSATIONS[:1], SMOKE, DataConfig()))
