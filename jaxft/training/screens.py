"""What a run shows of its steps: a live line on a terminal, a line per logged step anywhere else."""

from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from jaxft.terminal.console import say


def headline(row: Mapping[str, float]) -> list[str]:
    """Loss, learning rate and speed, for the console."""
    parts = []
    if "loss" in row:
        parts.append(f"loss {row['loss']:.4f}")
    if "reward" in row:
        parts.append(f"reward {row['reward']:.3f}")
    if "learning_rate" in row:
        parts.append(f"lr {row['learning_rate']:.1e}")
    if "tokens_per_second" in row:
        rate = row["tokens_per_second"]
        parts.append(f"{rate:,.0f} tok/s" if rate >= 10 else f"{rate:.1f} tok/s")
    return parts


class Remaining:
    """Time left, from the pace since the first logged step (the time before it is mostly compilation)."""

    def __init__(self, total_steps: int, clock: Callable[[], float]) -> None:
        self._total_steps, self._clock = total_steps, clock
        self._first: tuple[int, float] | None = None

    def after(self, step: int) -> list[str]:
        """`["2:31 left"]`, or [] if the pace is not known yet or no step is left."""
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
        first_step, first_time = self._first
        if step <= first_step or step >= self._total_steps:
            return []
        seconds = round((self._total_steps - step) * (now - first_time) / (step - first_step))
        hours, minutes, seconds = seconds // 3600, seconds // 60 % 60, seconds % 60
        return [f"{hours}:{minutes:02d}:{seconds:02d} left" if hours else f"{minutes}:{seconds:02d} left"]


class PlainScreen:
    """A line per logged step, for files and pipes."""

    def __init__(self, console: Console, total_steps: int, done_steps: int) -> None:
        self._console, self._total_steps = console, total_steps

    def show(self, step: int, parts: list[str]) -> None:
        self.print("  ".join([f"step {step}/{self._total_steps}", *parts]))

    def print(self, text: str) -> None:
        say(self._console, text)

    def close(self) -> None:
        pass


class LiveScreen:
    """A progress line that stays at the bottom of a terminal; other text scrolls above it."""

    def __init__(self, console: Console, total_steps: int, done_steps: int) -> None:
        columns = (
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[metrics_text]}", markup=False),
        )
        # Only twice a second, because the thread that draws takes time from the training step.
        self._progress = Progress(*columns, console=console, refresh_per_second=2)
        self._task = self._progress.add_task("train", total=total_steps, completed=done_steps, metrics_text="compiling")
        self._progress.start()

    def show(self, step: int, parts: list[str]) -> None:
        self._progress.update(self._task, completed=step, metrics_text="  ".join(parts))

    def print(self, text: str) -> None:
        say(self._progress.console, text)

    def close(self) -> None:
        self._progress.stop()
