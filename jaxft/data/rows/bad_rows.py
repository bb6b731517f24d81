"""Rows that cannot be trained on: all of a set are told at once, or left out with their count."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxft.errors import counted

NAMED = 20  # problems that a message shows, and rows that it names under one problem

# Takes the index of a row, its name in errors, and what is wrong with it.
OnBadRow = Callable[[int, str, Exception], None]


def refuse(row: int, where: str, error: Exception) -> None:
    """`OnBadRow` that ends the reading at the first bad row."""
    raise error


@dataclass
class Problem:
    """One problem, in the words of the first row that has it.

    row: the index of that row. rows: how many have it. names: of the first of them.
    """

    message: str
    row: int
    rows: int
    names: list[str]

    def __str__(self) -> str:
        if self.rows == 1:
            return self.message
        more = ", ..." if self.rows > len(self.names) else ""
        return f"{self.message} (the same in {self.rows - 1:,} more: {', '.join(self.names[1:])}{more})"


@dataclass
class BadRows:
    """The rows of a set that cannot be trained on. problems: the first 20 that differ, by their words without a row."""

    rows: list[int] = field(default_factory=list)
    problems: dict[str, Problem] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._known = set(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, row: object) -> bool:
        return row in self._known

    def add(self, row: int, where: str, error: Exception) -> None:
        """Takes what is wrong with a row; a row counts once. It is an `OnBadRow`."""
        if row in self:
            return
        self.rows.append(row)
        self._known.add(row)
        message = str(error)
        self._add(message.replace(where, "", 1), Problem(message=message, row=row, rows=1, names=[where]))

    def update(self, other: "BadRows") -> None:
        """Adds the bad rows of another part of the set."""
        self.rows += other.rows
        self._known.update(other.rows)
        for words, problem in other.problems.items():
            self._add(words, problem)

    def _add(self, words: str, problem: Problem) -> None:
        if words in self.problems:
            own = self.problems[words]
            own.rows += problem.rows
            own.names += problem.names[: NAMED - len(own.names)]
        elif len(self.problems) < NAMED:
            self.problems[words] = problem

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "BadRows":
        """The inverse of `dataclasses.asdict`."""
        problems = {words: Problem(**problem) for words, problem in values["problems"].items()}
        return cls(rows=list(values["rows"]), problems=problems)

    @property
    def messages(self) -> tuple[str, ...]:
        """What is wrong, the first 20 problems, each with its rows."""
        return tuple(map(str, sorted(self.problems.values(), key=lambda problem: problem.row)))

    def refusal(self, policy: str, total: int, source: str) -> str | None:
        """The error message for all bad rows if there are any and `policy`, data.bad_rows, is `refuse`, or all are bad.

        total: rows of the set. None: there is nothing to refuse.
        """
        if not self.rows or (policy == "skip" and len(self) < total):
            return None
        hidden = len(self) - sum(problem.rows for problem in self.problems.values())
        shown: Sequence[str] = [
            *self.messages,
            *([f"and {counted(hidden, 'row')} with other problems"] if hidden else []),
        ]
        mend = (
            "Correct the rows, or how they are read."
            if len(self) == total
            else "Correct or remove them, or train without them by data.bad_rows='skip'."
        )
        return (
            f"{len(self):,} of {counted(total, 'row')} of {source} cannot be trained on:\n  "
            + "\n  ".join(shown)
            + f"\n{mend}"
        )
