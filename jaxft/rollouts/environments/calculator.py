"""Questions with a calculator: the model may call it, and is rewarded if its last turn ends in the right number."""

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxft.files.strict_json import parse_json
from jaxft.rollouts.environments.messages import last_number, with_instructions, without_thoughts

CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
INSTRUCTIONS = (
    "You can use a calculator. To call it, write\n"
    '<tool_call>{"name": "calculator", "arguments": {"expression": "12 * (3 + 4)"}}</tool_call>\n'
    "and wait for the result. When you know the answer, write it without a call, with the number last."
)
MOST_CALLS = 4  # of a turn
LONGEST = 200  # characters of an expression
LARGEST = 1e15  # magnitude of every result: beyond it floats do not hold all whole numbers
TOLERANCE = 1e-6  # of the answer, relative

OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.UAdd: operator.pos, ast.USub: operator.neg,
}  # fmt: skip


class Calculator:
    """The `Environment`. The reward is 1 if the last number of the last turn equals that of the column `answer`."""

    columns = ("answer",)

    def reset(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The prompt of the row, with how to call the calculator. Raises ValueError if its answer has no number."""
        right = last_number(str(row["answer"]))
        if right is None:
            raise ValueError(f"the column 'answer' has no number: {row['answer']!r}")
        self._right = right
        self._final = ""
        return with_instructions(row["prompt"], INSTRUCTIONS)

    def step(self, completion: str) -> list[dict[str, Any]]:
        """The results of the calls in a turn; none if it has no call, and is the final answer."""
        calls = CALL.findall(without_thoughts(completion))
        self._final = "" if calls else without_thoughts(completion)
        return [{"role": "tool", "content": result_of(call)} for call in calls[:MOST_CALLS]]

    def reward(self) -> float:
        """1 for the right number, else 0."""
        given = last_number(self._final)
        return float(given is not None and math.isclose(given, self._right, rel_tol=TOLERANCE, abs_tol=1e-9))


def result_of(call: str) -> str:
    """What the calculator answers to the text of a call; errors are text too, from which the model can learn."""
    try:
        given = parse_json(call)
        if given["name"] != "calculator":
            return f"Error: there is no tool {given['name']!r}, only 'calculator'."
        return written(evaluate(given["arguments"]["expression"]))
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        return f"Error: {reason}."


def evaluate(expression: str) -> float:
    """The value of an expression of numbers, parentheses, + - * / // % and **.

    Raises ValueError for anything else, for expressions of more than 200 characters and for results that are not real
    numbers of at most 1e15.
    """
    if not isinstance(expression, str) or len(expression) > LONGEST:
        raise ValueError(f"an expression is text of at most {LONGEST} characters")
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError("this is not an expression of numbers, parentheses and + - * / // % **") from error
    except ZeroDivisionError as error:
        raise ValueError("division by zero") from error


def written(value: float) -> str:
    """The number as text: whole ones without a point, others with twelve digits."""
    return str(int(value)) if value == int(value) else format(value, ".12g")


def _value(node: ast.AST) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        value: float = node.value
    elif isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        value = OPERATORS[type(node.op)](_value(node.operand))
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        value = _power(_value(node.left), _value(node.right))
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        value = OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    else:
        raise ValueError("only numbers, parentheses and + - * / // % ** are allowed")
    if not abs(value) <= LARGEST:
        raise ValueError(f"the result is beyond {LARGEST:g}")
    return value


def _power(base: float, exponent: float) -> float:
    # By its logarithm, so that no huge number is ever made.
    if base and exponent * math.log10(abs(base)) > math.log10(LARGEST) + 1:
        raise ValueError(f"the result is beyond {LARGEST:g}")
    if base < 0 and exponent != int(exponent):
        raise ValueError("a root of a negative number is not real")
    return float(base**exponent) if exponent < 0 else base**exponent
