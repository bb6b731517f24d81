"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from jaxft.terminal.console import say
from jaxft.terminal.text import safe_line

LINES = 10  # printed in all, if the console is not a terminal
QUIET_SECONDS = 5.0  # work that takes less prints no line


@contextlib.contextmanager
def progress(console: Console, label: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yields a function to be called with the number of bytes done since its last call."""
    if not console.is_terminal:
        yield _lines(console, label, total_bytes)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(safe_line(label), total=total_bytes)
        yield lambda count: bar.advance(task, count)


def _lines(console: Console, label: str, total: int) -> Callable[[int], None]:
    start, done, shown = time.monotonic(), 0, 0

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        share, seconds = done * LINES // max(1, total), time.monotonic() - start
        if share > shown and seconds > QUIET_SECONDS:
            shown = share
            speed = f"{done / 1e9 / seconds:.2f} GB/s"
            say(console, f"{label}: {done / 1e9:.1f} of {total / 1e9:.1f} GB, {speed}")

    return advance
