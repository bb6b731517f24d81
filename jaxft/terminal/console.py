"""The console of jaxft: rich's, on which text of others is neither markup nor a command to the terminal."""

import errno
import os
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from jaxft.terminal.text import safe_line, safe_message, safe_text


class SafeConsole(Console):
    """A console of rich that escapes what it prints: tables, texts and progress lines too. Reads no markup."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def on_broken_pipe(self) -> None:
        """Raises BrokenPipeError, where rich would end the program with an exit code of its own."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of a renderable, their text escaped; those by which rich moves the cursor are its own."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(safe_text(segment.text), segment.style)


def say(console: Console, text: object, *, style: str = "") -> None:
    """Prints a message on any console, escaped, not read as markup, and not wrapped, because a file has no width."""
    console.print(Text(safe_message(text), style=style), soft_wrap=True, highlight=False)


def cell(text: object) -> Text:
    """A name or a short text of others in a table."""
    return Text(safe_line(text))
