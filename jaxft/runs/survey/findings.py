"""What an examination of files finds: for each part whether it is whole, and how to mend it if not."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from jaxft.errors import JaxftError
from jaxft.system import described

WHOLE, BROKEN, UNCHECKED = "whole", "broken", "not checked"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """part: what was examined. state: `whole`, `broken` or `not checked`. text: what of it, or why not. mend: how."""

    part: str
    state: str
    text: str
    mend: str | None = None


@dataclass
class Findings:
    """Findings in the order in which they were made."""

    all: list[Finding] = field(default_factory=list)

    def whole(self, part: str, text: str) -> None:
        """Adds that a part is whole."""
        self.all.append(Finding(part=part, state=WHOLE, text=text))

    def broken(self, part: str, text: str, mend: str | None = None) -> None:
        """Adds that a part is broken."""
        self.all.append(Finding(part=part, state=BROKEN, text=text, mend=mend))

    def unchecked(self, part: str, why: str) -> None:
        """Adds that a part was not compared with anything, and why."""
        self.all.append(Finding(part=part, state=UNCHECKED, text=why))

    def problems(self, part: str, problems: Sequence[str], whole: str, mend: str) -> None:
        """Adds that a part is broken for each of the problems, or that it is whole."""
        for problem in problems:
            self.broken(part, problem, mend)
        if not problems:
            self.whole(part, whole)

    @contextmanager
    def part(self, part: str, mend: str | None = None) -> Iterator[None]:
        """Inside this context, an error of a file or of its content becomes a finding."""
        try:
            yield
        except JaxftError as error:
            self.broken(part, str(error), mend)
        except OSError as error:
            self.broken(part, described(error), mend)
        except (ValueError, RecursionError) as error:  # of JSON that is cut, or nested deep
            self.broken(part, f"it is damaged: {error}", mend)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is broken."""
        return all(one.state != BROKEN for one in self.all)

    def to_json(self) -> list[dict[str, Any]]:
        """The findings as JSON."""
        return [{key: value for key, value in asdict(one).items() if value is not None} for one in self.all]
