"""Prints examined sets: rows with their trained tokens marked, counts and histograms."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxft.data.batch import Example
from jaxft.data.examine import Examination
from jaxft.data.examine_pairs import describe_pairs
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import counted
from jaxft.nn import virtual
from jaxft.terminal.text import safe_line, safe_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


def render_rows(
    examples: Sequence[Example], tokenizer: Tokenizer, *, limit: int = 2, console: "Console | None" = None
) -> None:
    """Prints the first `limit` examples with their trained tokens in colour, each document of an example by its name.

    If the output is not a terminal, trained text is in [[double brackets]] instead.
    """
    from rich.text import Text

    from jaxft.terminal.console import SafeConsole

    console = console or SafeConsole()
    colored = console.is_terminal and console.color_system is not None
    for number, example in enumerate(examples[:limit]):
        trained = int(example.mask.sum())
        first = int((example.tokens >= virtual.FIRST).sum())
        virtual_tokens = f", the first {first} virtual" if first and len(example.documents) == 1 else ""
        text = Text(
            f"row {example.row}: {counted(len(example), 'token')}{virtual_tokens}, {trained} trained\n", style="bold"
        )
        for name, document in zip(example.names, example.documents, strict=True):
            if name:
                text.append(
                    f"{safe_line(name)}: {len(document)} tokens, {int(document.mask.sum())} trained\n", style="not bold"
                )
            _append_marked(text, document, tokenizer, colored=colored)
            if name != example.names[-1]:
                text.append("\n")
        console.print(text, highlight=False, soft_wrap=True)
        if number < limit - 1:
            console.print()


def _append_marked(text: "Text", document: Example, tokenizer: Tokenizer, *, colored: bool) -> None:
    """Appends the text of a document, trained tokens in colour or in double brackets, without virtual tokens."""
    first = int((document.tokens >= virtual.FIRST).sum())
    shown = document.tokens[first:], document.mask[first:]
    edges = np.flatnonzero(np.diff(shown[1])) + 1
    for tokens, mask in zip(*(np.split(part, edges) for part in shown), strict=True):
        piece = safe_text(tokenizer.decode(tokens, skip_special_tokens=False))
        if colored:
            text.append(piece, style="bold green" if mask[0] else "dim")
        else:
            text.append(f"[[{piece}]]" if mask[0] else piece, style="not bold")


def print_examination(examination: Examination, *, console: "Console | None" = None, name: str | None = None) -> None:
    """Prints the counts, the length histogram as bars, and the warnings. name: printed before the source."""
    from rich.table import Table
    from rich.text import Text

    from jaxft.terminal.console import SafeConsole, say

    console = console or SafeConsole()
    splits_rows = examination.examples + examination.dropped != examination.rows
    windows = (
        f", {examination.windowed:,} cut into {counted(examination.windows, 'window')}" if examination.windowed else ""
    )
    share = examination.trained_tokens / examination.tokens
    formats = ", ".join(f"{name} {count:,}" for name, count in examination.formats.items())
    holds = ", ".join(f"{name} {count:,}" for name, count in examination.holds.items() if count)
    say(console, f"{name}: {examination.source}" if name else examination.source, style="bold")
    say(
        console,
        f"{counted(examination.rows, 'row')} ({formats or 'unknown format'}), "
        + (f"{counted(examination.examples, 'example')}, " if splits_rows else "")
        + f"{counted(examination.tokens, 'token')}, {examination.trained_tokens:,} trained ({share:.0%})\n"
        + (f"rows with {holds}\n" if holds else "")
        + f"{counted(examination.sequences, 'sequence')} of {examination.max_length:,}, {examination.fill:.0%} full; "
        f"{counted(examination.truncated, 'example')} cut, {examination.dropped:,} dropped{windows}",
    )
    if examination.unread:
        columns = "".join(f"\n  {column}: {column.treatment}" for column in examination.unread)
        say(console, f"columns that nothing reads:{columns}")
    if examination.bad_rows:
        shown = "".join(f"\n  {message}" for message in examination.bad_rows)
        say(console, f"rows that are left out, {examination.skipped:,} in all:{shown}")
    if examination.pairs is not None:
        say(console, describe_pairs(examination.pairs))
    table = Table("tokens", "examples", "", box=None, pad_edge=False)
    most = max(count for _, _, count in examination.histogram)
    for low, high, count in examination.histogram:
        over = "red" if low > examination.max_length else "green"
        bar = "#" * round(32 * count / most) or ("." if count else "")
        table.add_row(f"{low:,}-{high:,}", f"{count:,}", Text(bar, style=over))
    console.print(table)
    for warning in examination.warnings:
        say(console, f"warning: {warning}", style="yellow")
