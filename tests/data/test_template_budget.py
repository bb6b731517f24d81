"""Chat templates as programs of strangers: what has no end or no measure is stopped, what renders stays as it is."""

from pathlib import Path

import pytest

from jaxft.assets import ASSETS
from jaxft.data.chat import budget
from jaxft.data.chat.budget import BudgetExceeded, budget_for
from jaxft.data.chat.sandbox import compiled
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.data.tokenizers.tokenizer import TemplateLimit, TemplateRefusal

from chat_templates import CHANNELS, LLAMA3_TOOLS, QWEN3, QWEN3_TAGGED  # isort: skip

MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}]
NS = "{%% set ns = namespace(x=%s) %%}{%% for i in range(200) %%}{%% set ns.x = %s %%}{%% endfor %%}{{ ns.x }}"
BLOCK = "{% block bA %}{{ self.bB() }}{{ self.bB() }}{% endblock %}"
STEPS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops with a condition": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(x) %}{% if x %}{{ f(x-1) }}{{ f(x-1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "blocks": "".join(
        f"{{% block b{i} %}}{{{{ self.b{i + 1}() }}}}{{{{ self.b{i + 1}() }}}}{{% endblock %}}" for i in range(60)
    )
    + "{% block b60 %}x{% endblock %}",
    "call blocks": "{% macro m() %}{% for i in range(99999) %}{{ caller() }}{% endfor %}{% endmacro %}"
    "{% call m() %}{% for i in range(99999) %}{% endfor %}{% endcall %}",
    "filters in filters": "{% for i in range(999) %}{{ range(9999)|map('int')|list|length }}{% endfor %}",
}
CHARACTERS = {
    "product": "{{ 'x' * 10**9 }}",
    "product that is set": "{% set x = 10**10 * 'x' %}",
    "product of a list": "{% set x = [1] * 10**9 %}",
    "sum": NS % ("'aaa'", "ns.x + ns.x"),
    "sum of lists": NS % ("[1]", "ns.x + ns.x"),
    "concatenation": NS % ("'aaa'", "ns.x ~ ns.x"),
    "lists in lists": NS % ("[1]", "[ns.x, ns.x]"),
    "tuples in tuples": NS % ("1", "(ns.x, ns.x)"),
    "objects in objects": NS % ("[1]", "{'a': ns.x, 'b': ns.x}"),
    "dict": NS % ("[1]", "dict(a=ns.x, b=ns.x)"),
    "fromkeys": NS % ("[1]", "dict.fromkeys(['a', 'b'], ns.x)"),
    "namespaces": NS % ("[1]", "namespace(a=ns.x, b=ns.x)"),
    "arguments": "{% macro f(n) %}{% if n %}{{ f(n-1, varargs, varargs) }}{% else %}{{ varargs }}{% endif %}"
    "{% endmacro %}{{ f(60, 1) }}",
    "indent of JSON": "{{ messages|tojson(indent=10**8) }}",
    "separators of JSON": "{{ messages|tojson(separators=('x' * 9999999, ':')) }}",
    "wordwrap": "{{ ('a ' * 100000)|wordwrap(1, wrapstring='x' * 100000) }}",
    "center": "{{ 'a'|center(10**10) }}",
    "center of a text": "{{ 'a'.center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill of bytes": "{{ 'a'.encode().zfill(10**10) }}",
    "expandtabs": "{{ '\\t'.expandtabs(10**10) }}",
    "width": "{{ '%9999999999d' % 1 }}",
    "width from a value": "{{ '%*d' % (10**9, 1) }}",
    "width of format": "{{ '{:9999999999}'.format(1) }}",
    "width of format from a value": "{{ '{:{}}'.format(1, 10**9) }}",
    "width of format_map": "{{ '{a:9999999999}'.format_map({'a': 1}) }}",
    "the filter format": "{{ '%9999999999d'|format(1) }}",
    "format of a long value": "{% set x = 'x' * 100000 %}{{ ('%(a)s' * 100000) % {'a': x} }}",
    "replace": "{% set x = 'a' * 10000 %}{{ x.replace('a', x).replace('a', x) }}",
    "the filter replace": "{% set x = 'a' * 10000 %}{{ x|replace('a', x)|replace('a', x) }}",
    "join": "{{ range(90000)|join('x' * 90000) }}",
    "join of a text": "{{ ('x' * 90000).join('y' * 90000) }}",
    "translate": "{{ ('a' * 10000).translate({97: 'x' * 100000}) }}",
    "indent": "{{ ('\\n' * 10000)|indent(10**7) }}",
    "indent by a text": "{% set x = 'x' * 9999999 %}{{ ('a\\n' * 10)|indent(x) }}",
    "batch": "{{ [1]|batch(10**9, 'x')|list|length }}",
    "slice": "{{ [1]|slice(10**9)|list|length }}",
    "to_bytes": "{{ (1).to_bytes(length=10**10) }}",
    "lists added up": "{{ ([[1] * 1000] * 10000)|sum(start=[])|length }}",
    "output": "{% for i in range(99999) %}{{ messages[0].content * 1000 }}{% endfor %}",
    "text of the template": "{% for i in range(99999) %}" + "y" * 10000 + "{% endfor %}",
    "text of a branch": "{% for i in range(99999) %}{% if i %}" + "y" * 10000 + "{% endif %}{% endfor %}",
    "work on a long text": "{% set x = 'a' * 9999999 %}{% for i in range(99999) %}{% set y = x.strip() %}{% endfor %}",
    "slices of a long text": "{% set x = 'a' * 9999999 %}{% for i in range(99999) %}{% set y = x[1:] %}{% endfor %}",
    "date": "{{ strftime_now('%9999999999d') }}",
    "map": "{{ range(99999)|map('center', 100000)|list }}",
}
LIMITS = {
    "power": ("{{ 7**(10**8) }}", "integer of more than"),
    "products of integers": (NS % ("10**1000", "ns.x * ns.x"), "integer of more than"),
    "rounding": ("{{ 1.5|round(10**8, 'floor') }}", "rounds to 100,000,000 digits"),
    "a long template": ("x" * 1_000_001, "its text has 1,000,001 characters"),
}
ALL = {
    **{name: (text, "more than 20,000 steps") for name, text in STEPS.items()},
    **{name: (text, "more than 1,000,000 characters") for name, text in CHARACTERS.items()},
    **LIMITS,
}


def rendered(template, messages=MESSAGES, **variables):
    with budget_for(messages, variables):
        return compiled(template).render(messages=messages, **variables)


@pytest.mark.parametrize(("template", "limit"), ALL.values(), ids=ALL.keys())
def test_what_has_no_end_or_no_measure_is_stopped(template, limit, monkeypatch):
    monkeypatch.setattr(budget, "STEPS", 20_000)
    monkeypatch.setattr(budget, "CHARACTERS", 1_000_000)
    with pytest.raises(BudgetExceeded, match=limit):
        rendered(template)


def test_a_long_conversation_has_a_larger_budget():
    copies = "{% for m in messages %}{% for n in messages %}{{ n.content }}{% endfor %}{% endfor %}"
    long = [{"role": "user", "content": "x" * 500}] * 250
    assert len(rendered(copies, long)) == 250 * 250 * 500 > budget.CHARACTERS
    with pytest.raises(BudgetExceeded, match="and 100 for each"):
        rendered(copies, [{"role": "user", "content": "x" * 500}] * 3000)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    vocab = {character: i for i, character in enumerate([*map(chr, range(32, 127)), "\n", "<|end|>"])}
    model = tokenizers.models.BPE(vocab=vocab, merges=[])
    backend = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), eos_token="<|end|>")
    backend.chat_template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    backend.save_pretrained(folder)
    return load_tokenizer(folder)


def test_templates_are_rendered_as_transformers_renders_them(tokenizer):
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"a": [1, {"b": None}], "c": "\u00fc"}}}]
    conversation = [
        {"role": "system", "content": "s"},
        *MESSAGES,
        {"role": "user", "content": "again\n"},
        {"role": "assistant", "content": "<think>\nx\n</think>\n\nyes", "reasoning_content": "x", "tool_calls": calls},
        {"role": "tool", "content": "{}"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
    files = [path.read_text(encoding="utf-8") for path in Path(ASSETS / "chat_templates").glob("*.jinja")]
    operators = (
        "{%- for m in messages[::-1] if m.role != 'x' -%}{{ loop.index ~ m['role'] + '|' ~ 3 ~ none }}"
        "{{ '%-5s' % m.role }}"
        "{{ [m.role, 1][-1] }}{{ (m.role, 'b')|join('-') }}{{ {'a': m.role}|tojson(indent=2) }}"
        "{{ m.nothing is defined }}"
        "{{ m.content|trim|replace('a', 'bb')|upper|indent(2)|center(20) }}{{ m['none'] or m.get('role').center(9) }}"
        "{{ '{:>9}'.format(m.role) }}{{ 2 ** 10 * 3 % 7 }}{{ m.content[1:3] }}"
        "{{ m.items()|list|length }}{{ 1.25|round(1) }}"
        "{% generation %}{% set x = 1 %}{{ m.content }}{% endgeneration %}{{ x is defined }}{%- endfor -%}"
    )
    count = 0
    for text in (*files, CHANNELS, LLAMA3_TOOLS, QWEN3, QWEN3_TAGGED, operators):
        for messages in (conversation, conversation[1:], MESSAGES):
            for given in ({}, {"tools": tools}, {"add_generation_prompt": True}):
                one = tokenizer.with_template("x")
                one.backend.chat_template = text
                try:  # outside a budget transformers renders in its own environment
                    expected = one.backend.apply_chat_template(messages, tokenize=False, **given)
                except Exception:
                    with pytest.raises(TemplateRefusal):
                        one.apply_template(messages, **given)
                    continue
                assert one.apply_template(messages, **given) == expected
                count += 1
    assert count > 80


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1/0 }}", "division by zero"),
        ("{{ 10.0**400 }}", "out of range"),
        ("{{ 'abc'.index('z') }}", "substring not found"),
        ("{{ range(10**9) }}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
        ("{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}", "calls itself without end"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "calls itself without end"),
        ("{% for i in [1] %}" * 60 + "{% endfor %}" * 60, "nested"),
        ("{{ x.y.z }}", "'x' is undefined"),
        ("{{ 'a'|urlize }}", "No filter named 'urlize'"),
        ("{{ raise_exception('\x1b[2J') }}", "refuses these messages"),
    ],
)
def test_a_template_that_fails_refuses_the_messages(tokenizer, template, reason):
    with pytest.raises(TemplateRefusal, match=reason):
        tokenizer.with_template("x").with_template(template).render(MESSAGES)


def test_a_template_that_is_stopped_is_told_apart_and_where_it_comes_from(tokenizer):
    with pytest.raises(TemplateLimit, match=r"was stopped: it makes more .* Set data.chat_template .* to another one"):
        tokenizer.with_template("{{ 'x' * 10**9 }}")


@pytest.mark.parametrize("text", ["a\ud800b", "\udcff"])
def test_half_a_character_is_refused_before_the_tokenizer_sees_it(tokenizer, text):
    for encode in (
        tokenizer.encode,
        lambda one: tokenizer.encode_batch([one]),
        lambda one: tokenizer.encode_batch_with_spans([one]),
    ):
        with pytest.raises(Exception, match="half of a character") as error:
            encode(text)
        assert type(error.value).__name__ == "DataError"
