"""What an environment is: the three methods that a class of a user has."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Message = dict[str, Any]


class Environment(Protocol):
    """The other side of one conversation with the model. Each answer has an instance of its own.

    The class is called without arguments. It may have an attribute `columns`, the names of the columns that its rows
    must have. All calls of an instance are made in the same process.
    """

    def reset(self, row: Mapping[str, Any]) -> Sequence[Message]:
        """The prompt, as messages whose last one is not of the assistant.

        row: the columns of the row; `prompt`, its text or messages; and `index`, its number in its set, unless it has a
        column of that name. All answers to a row are compared, so the same row should give the same prompt.
        """

    def step(self, completion: str) -> Sequence[Message]:
        """What follows a turn of the model: messages of `user`, `tool` or `system`; none if the conversation is over.

        completion: the text of the turn, without stop tokens. It is called for every turn, also for one that was cut
        off and for the last one that is allowed; what it returns then is not shown to the model.
        """

    def reward(self) -> float | None:
        """The reward of the whole conversation, called once at its end; None if it is not scored."""
