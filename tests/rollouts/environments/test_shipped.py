"""The environments that ship with jaxft: they reward what is right, and compute nothing but arithmetic."""

import time

import pytest

from jaxft.rollouts.environments.calculator import Calculator, evaluate, result_of, written
from jaxft.rollouts.environments.guess_number import GuessNumber
from jaxft.rollouts.environments.messages import last_number, with_instructions

PROMPT = [{"role": "user", "content": "What is 12 * 7 - 0.5?"}]


def call(expression, name="calculator"):
    return f'<tool_call>{{"name": "{name}", "arguments": {{"expression": "{expression}"}}}}</tool_call>'


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12 * (3 + 4)", "84"), ("-7 // 2", "-4"), ("7 % 3", "1"), ("2 ** 10", "1024"), ("1 / 3", "0.333333333333"),
        ("2 ** -1", "0.5"), ("4 ** 0.5", "2"), ("+3 - -2", "5"), ("1e3 * 2", "2000"), ("0 ** 0", "1"),
        ("10 / 4", "2.5"),
    ],
)  # fmt: skip
def test_the_calculator_is_right(expression, value):
    assert written(evaluate(expression)) == value


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("__import__('os').system('ls')", "only numbers"), ("a + 1", "only numbers"), ("'a' * 9", "only numbers"),
        ("True + 1", "only numbers"), ("1j * 1j", "only numbers"), ("[1, 2]", "only numbers"),
        ("1 < 2", "only numbers"),
        ("9 ** 9 ** 9", "beyond"), ("10 ** 15 * 10", "beyond"), ("0.1 ** -99999", "beyond"),
        ("2 ** 10000000", "beyond"),
        ("1 / 0", "division by zero"), ("0 ** -1", "division by zero"), ("(-8) ** 0.5", "not real"),
        ("1 +", "not an expression"), ("(" * 150 + "1", "not an expression"), ("1" * 201, "at most 200"),
        ("9" * 150 + " ** 9", "beyond"), ("2 << 3", "only numbers"), ("1e999", "beyond"), ("1e999 - 1e999", "beyond"),
        ("1e10 ** -1e10 ** 9", "beyond"),
    ],
)  # fmt: skip
def test_the_calculator_refuses_what_is_not_arithmetic_of_moderate_numbers(expression, message):
    started = time.monotonic()
    with pytest.raises(ValueError, match=message):
        evaluate(expression)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ('{"name": "calculator", "arguments": {"expression": "1 + 1"}}', "2"),
        ('{"name": "calculator", "arguments": {"expression": "1 + x"}}', "Error: only numbers"),
        ('{"name": "search", "arguments": {}}', "Error: there is no tool 'search'"),
        ('{"name": "calculator", "arguments": {}}', "Error: 'expression' is missing"),
        ('{"name": "calculator", "arguments": {"expression": 5}}', "Error: an expression is text"),
        ("[1]", "Error: "),
        ("not JSON", "Error: "),
    ],
)
def test_a_failure_of_the_tool_is_text(text, result):
    assert result_of(text).startswith(result)


def test_a_question_with_the_calculator_is_rewarded_for_the_last_number():
    one = Calculator()
    (message,) = one.reset({"prompt": PROMPT, "answer": "#### 83.5"})
    assert message["role"] == "user" and "<tool_call>" in message["content"] and "12 * 7" in message["content"]
    replies = one.step(f"<think>{call('5')}</think>I multiply. {call('12 * 7')} {call('84 - 0.5')}")
    assert replies == [{"role": "tool", "content": "84"}, {"role": "tool", "content": "83.5"}]
    assert one.reward() == 0
    assert one.step("It is 84 - 0.5 = 83.50.") == []
    assert one.reward() == 1
    assert one.step("No, it is 84") == [] and one.reward() == 0
    assert one.step("I do not know") == [] and one.reward() == 0
    with pytest.raises(ValueError, match="has no number: 'none'"):
        one.reset({"prompt": PROMPT, "answer": "none"})


def test_instructions_join_the_system_message_or_the_first_one():
    assert with_instructions("Q", "I") == [{"role": "user", "content": "I\n\nQ"}]
    system = {"role": "system", "content": "S"}
    assert with_instructions([system, *PROMPT], "I") == [{"role": "system", "content": "S\n\nI"}, *PROMPT]
    assert system["content"] == "S"


@pytest.mark.parametrize(
    ("text", "number"), [("-1,234.5 in all", -1234.5), ("3 then 1e3", 1000), ("12.", 12), ("none", None), ("x-7", -7)]
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == number


def test_the_game_tells_higher_and_lower_and_rewards_few_guesses():
    one = GuessNumber()
    (message,) = one.reset({"prompt": "Play.", "index": 5, "secret": 37})
    assert "from 1 to 100" in message["content"] and "37" not in message["content"]
    assert one.step("My guess is 50.")[0]["content"] == "My number is lower."
    assert one.step("25")[0]["content"] == "My number is higher."
    assert one.step("hm")[0]["content"] == "Answer with a whole number from 1 to 100."
    assert one.reward() == 0
    assert one.step("37") == [] and one.reward() == 1
    one.reset({"prompt": "Play.", "index": 5, "secret": 37})
    for _ in range(13):
        one.step("5")
    assert one.step("37") == [] and one.reward() == 0.75


def test_the_secret_of_a_row_is_always_the_same_and_within_the_range():
    secrets = []
    for index in range(40):
        one, other = GuessNumber(), GuessNumber()
        for game in (one, other):
            game.reset({"prompt": "Play.", "index": index, "low": 10, "high": 15})
        assert one._secret == other._secret
        secrets.append(one._secret)
    assert set(secrets) == set(range(10, 16))
    with pytest.raises(ValueError, match="secret=9 is not between low=10 and high=15"):
        one.reset({"prompt": "Play.", "index": 0, "low": 10, "high": 15, "secret": 9})
    with pytest.raises(ValueError, match="low=3 is above high=2"):
        one.reset({"prompt": "Play.", "index": 0, "low": 3, "high": 2})
