"""The reward functions that ship with jaxft."""

import socket
import subprocess
import sys

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
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "def double(x): raise SystemExit(0)",
        "text = '''",
    ],
    ids=["exit", "at once", "in the test", "quote"],
)
def test_code_that_leaves_before_the_end_of_the_tests_fails(code):
    assert verifiers.python_tests([code], ["text = ''''''\nassert double(4) == 8"]) == [0]


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


def test_code_has_no_network_where_linux_allows_it():
    probe = "import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare(0x50000000) != 0)"
    if sys.platform != "linux" or subprocess.run([sys.executable, "-c", probe]).returncode:
        pytest.skip("this system refuses namespaces")
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = server.getsockname()[:2]
        socket.create_connection(where, 10).close()
        assert verifiers.python_tests([f"import socket; socket.create_connection({where}, 10)"], ["pass"]) == [0]


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
