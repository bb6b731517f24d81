"""The reward functions that ship with jaxft."""

import pytest

from jaxft.evaluation import verifiers

CODE = "Here it is:\n```python\ndef double(x):\n    return 2 * x\n```\nDone."


def test_metrics_are_rewards():
    answers, references = ['{"a": 1}', "<think>hm</think>yes", "no {"], ['{"a": 1.0}', "yes", "no"]
    assert verifiers.exact_match(answers, references) == [0, 1, 0]
    assert verifiers.json_valid(answers) == [1, 0, 0]
    assert verifiers.json_exact(answers[:1], references[:1], other=[1]) == [1]
    messages = [[{"role": "assistant", "content": "yes"}]]
    assert verifiers.exact_match(messages, ["yes"]) == [1]


def test_code_is_run_with_its_tests():
    tests = ["assert double(4) == 8", "assert double(4) == 9", "assert double('a') == 'aa'"]
    assert verifiers.python_tests([CODE] * 3, tests) == [1, 0, 1]
    assert verifiers.python_tests(["x = 3"], ["assert x == 3"]) == [1]


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "x = 'a' * (1 << 32)",
        "open('f', 'w').write('a' * (1 << 21))",
        "import sys; sys.exit(1)",
        "x =",
    ],
    ids=["endless", "memory", "disk", "exit", "syntax"],
)
def test_code_beyond_its_limits_fails(code, monkeypatch):
    monkeypatch.setattr(verifiers, "CPU_SECONDS", 1)
    assert verifiers.python_tests([code], ["pass"]) == [0]


def test_code_sees_neither_the_folder_nor_the_environment_of_the_run(monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    test = "import os; assert 'SECRET' not in os.environ and os.listdir('.') == []"
    assert verifiers.python_tests(["pass"], [test]) == [1]


@pytest.mark.parametrize(
    ("text", "code"),
    [("plain", "plain"), ("```py\na\n```", "a\n"), ("```\na\n```\nand\n```python\nb\n```", "b\n"), ("`a`", "`a`")],
)
def test_the_last_block_is_the_code(text, code):
    assert verifiers.code_of(text) == code


def test_math_is_compared_by_value():
    pytest.importorskip("math_verify")
    answers = ["So it is $\\frac{1}{2}$.", "It is 3", "It is $0.5$"]
    assert verifiers.math_answer(answers, ["$1/2$", "$4$", "$1/2$"]) == [1, 0, 1]
