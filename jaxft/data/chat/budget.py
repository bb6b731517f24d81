"""What rendering a chat template may cost: a template is a program of a stranger, and its loops may have no end."""

import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from jinja2.utils import Namespace

STEPS = 1_000_000  # turns of loops and calls, beside those that the size of the input allows
CHARACTERS = 20_000_000  # of text that is made on the way, and elements of lists
STEPS_PER_CHARACTER, CHARACTERS_PER_CHARACTER = 10, 100  # more for long conversations, whose rendering costs more
SECONDS = 10.0
MOST_INPUT = 10**9
NODE = 16  # characters that a value counts for beside its text, since it takes time to look at
INTEGER_BITS = 13_000  # about the 4,300 digits that Python writes out


class BudgetExceeded(Exception):
    """A template that does more than rendering these messages can need. The message says which limit it met."""


class Budget:
    """What is left of the steps, characters and seconds of one rendering."""

    __slots__ = ("_deadline", "_inputs", "_is_whole", "characters", "steps")

    def __init__(self, inputs: tuple[Any, ...]) -> None:
        self.steps, self.characters = STEPS, CHARACTERS
        self._inputs, self._is_whole = inputs, False
        self._deadline = time.monotonic() + SECONDS

    def step(self, characters: int = 0) -> None:
        """Counts a turn of a loop or a call, and the characters that it writes."""
        self.steps -= 1
        self.characters -= characters
        if self.steps < 0 or self.characters < 0 or not self.steps & 0xFFF:
            self.check()

    def charge(self, characters: int) -> None:
        """Counts characters, or elements of a list, before they are made. Raises BudgetExceeded beyond the limit."""
        self.characters -= characters
        if self.characters < 0 or characters > 100_000:
            self.check()

    def check(self) -> None:
        """Raises BudgetExceeded if too much has been done. The size of the input is looked at only when it matters."""
        if time.monotonic() > self._deadline:
            raise BudgetExceeded(f"it takes longer than {SECONDS:.0f} seconds")
        if (self.steps < 0 or self.characters < 0) and not self._is_whole:
            self._is_whole = True
            size = size_of(self._inputs, MOST_INPUT)
            self.steps += STEPS_PER_CHARACTER * size
            self.characters += CHARACTERS_PER_CHARACTER * size
        if self.steps < 0:
            raise BudgetExceeded(f"it takes more than {STEPS:,} steps")
        if self.characters < 0:
            raise _too_long()


_active: ContextVar[Budget] = ContextVar("budget of a chat template")


class budget_for:
    """Within it, templates are rendered with a budget that suits the size of these inputs."""

    def __init__(self, *inputs: Any) -> None:
        self._budget = Budget(inputs)

    def __enter__(self) -> None:
        self._token = _active.set(self._budget)

    def __exit__(self, *_: object) -> None:
        _active.reset(self._token)


def is_limited() -> bool:
    """Whether templates are rendered with a budget here."""
    return _active.get(None) is not None


def active() -> Budget:
    """The budget of the rendering under way. Raises LookupError outside `budget_for`."""
    return _active.get()


def size_of(value: Any, most: int) -> int:
    """About the characters that a value takes if it is written out; one for each of its values at least.

    Raises BudgetExceeded for more than `most`: a list may hold the same list twice, which holds another twice, ...
    """
    size, rest = 0, [value]
    while rest:
        one = rest.pop()
        size += NODE
        if isinstance(one, str | bytes):
            size += len(one)
        elif isinstance(one, Mapping):
            rest += one.keys()
            rest += one.values()
        elif isinstance(one, list | tuple | set | frozenset):
            rest += one
        elif isinstance(one, int):
            size += one.bit_length() // 3
        elif isinstance(one, Namespace):
            rest += object.__getattribute__(one, "_Namespace__attrs").values()
        if size + len(rest) > most:
            raise _too_long()
    return size


def charge_value(value: Any) -> Any:
    """Counts a value as it is written out, and returns it."""
    budget = _active.get()
    kind = type(value)
    if kind is str:
        budget.characters -= len(value)
        if budget.characters < 0:
            budget.check()
    elif kind is not bool and kind is not float and value is not None:
        charge_size(value)
    return value


def charge_size(value: Any) -> None:
    """Counts all values that are within a value."""
    budget = active()
    try:
        size = size_of(value, budget.characters)
    except BudgetExceeded:
        budget.charge(budget.characters + 1)  # more than is left, unless the input is large
        size = size_of(value, budget.characters)
    budget.charge(size)


def _too_long() -> BudgetExceeded:
    return BudgetExceeded(
        f"it makes more than {CHARACTERS:,} characters, and {CHARACTERS_PER_CHARACTER} for each of the input"
    )
