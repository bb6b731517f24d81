"""Prints what a deep examination examination: a line for each check, and the first rows of each finding."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jaxft.data.deep.balance import Balance
from jaxft.data.deep.duplicates import Duplicates
from jaxft.data.deep.examine import DeepExamination
from jaxft.data.deep.shapes import Odd
from jaxft.errors import counted
from jaxft.terminal.console import say
from jaxft.terminal.text import safe_line

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = 60  # characters of a text of others in a line


def print_deep(examination: DeepExamination, console: "Console", rows: int) -> None:
    """Prints the findings. rows: how many of each are named; JSON has all."""
    texts = examination.texts
    say(
        console,
        f"{counted(texts.train, 'training row')}, {counted(len(texts) - texts.train, 'held-out row')}",
        style="bold",
    )
    for title, lines in _sections(examination):
        say(console, title, style="yellow" if lines else "")
        for line in lines[:rows]:
            say(console, f"  {line}")
        if len(lines) > rows:
            say(console, f"  and {len(lines) - rows:,} more (--json has all, --rows=N shows N)")
    dropped = Counter(examination.dropped().values())
    say(console, f"rows that --write=FILE leaves out: {_counts(dropped) or 'none'}")


def _sections(examination: DeepExamination) -> Iterator[tuple[str, list[str]]]:
    yield (
        "cannot be read: " + counted(len(examination.problems), "row"),
        [safe_line(text) for text in examination.problems.values()],
    )
    yield _duplicates("duplicate questions", examination, examination.questions)
    yield _duplicates("duplicate rows", examination, examination.whole)
    yield _leaks(examination)
    yield _contradictions(examination)
    kinds = Counter(odd.kind for odd in examination.odd)
    yield f"odd shapes: {_counts(kinds) or 'none'}", [_odd(examination, odd) for odd in _alternating(examination.odd)]
    for balance in examination.balances:
        yield _balance(balance)
    if examination.suspects is not None:
        yield _suspects(examination)


def _duplicates(what: str, examination: DeepExamination, pairs: Duplicates) -> tuple[str, list[str]]:
    share = len(pairs.rows) / max(examination.texts.train, 1)
    title = f"{what}: {len(pairs.exact):,} exact, {len(pairs.near):,} near ({share:.1%} of the rows)"
    where = examination.texts.where
    return title, [
        f"{_name(where, pair.second)} repeats {_name(where, pair.first)} ({pair.similarity:.2f})"
        for pair in (*pairs.exact, *pairs.near)
    ]


def _leaks(examination: DeepExamination) -> tuple[str, list[str]]:
    kinds = Counter(leak.kind for leak in examination.leaks)
    held_out = len({leak.held_out for leak in examination.leaks})
    total = len(examination.texts) - examination.texts.train
    title = f"leaks: {held_out:,} of {counted(total, 'held-out row')} in training rows"
    return title + (f" ({_counts(kinds)})" if kinds else ""), [
        f"{_name(examination.texts.where, leak.train)} shows {_name(examination.texts.where, leak.held_out)}: "
        + ("13 words in a row" if leak.similarity is None else f"{leak.kind}, {leak.similarity:.2f}")
        for leak in examination.leaks
    ]


def _contradictions(examination: DeepExamination) -> tuple[str, list[str]]:
    where = examination.texts.where
    return f"contradictions: {counted(len(examination.contradictions), 'pair')}", [
        f"{_name(where, one.first)} and {_name(where, one.second)} ask the same ({one.similarity:.2f}): "
        f"{_quoted(examination, one.first)} and {_quoted(examination, one.second)}"
        for one in examination.contradictions
    ]


def _odd(examination: DeepExamination, odd: Odd) -> str:
    return f"{_name(examination.texts.where, odd.row)}: {safe_line(odd.text)}"


def _alternating(odd: Sequence[Odd]) -> list[Odd]:
    """The odd rows so that the first of each kind come first."""
    seen: Counter[str] = Counter()
    ranked: list[tuple[int, int, Odd]] = []
    for number, one in enumerate(odd):
        ranked.append((seen[one.kind], number, one))
        seen[one.kind] += 1
    return [one for *_, one in sorted(ranked, key=lambda item: item[:2])]


def _balance(balance: Balance) -> tuple[str, list[str]]:
    commonest = ", ".join(f"{safe_line(share.value, SHOWN)} {share.train:.0%}" for share in balance.commonest)
    title = f"{safe_line(balance.name, SHOWN)}: {counted(balance.values, 'value')}, {commonest}"
    return title, [
        f"{safe_line(share.value, SHOWN)}: {share.train:.1%} of training rows and {share.held_out or 0:.1%} of held-out"
        for share in balance.shifted
    ]


def _suspects(examination: DeepExamination) -> tuple[str, list[str]]:
    suspects, where = examination.suspects or [], examination.texts.where
    return f"answers that may be wrong: the likeliest {len(suspects):,}", [
        f"{_name(where, one.row)}: {safe_line(repr(one.answer), SHOWN)}, {one.loss:.2f} nats per token "
        f"({one.excess:+.2f})"
        + ("" if one.model is None else f"; the model answers {safe_line(repr(one.model), SHOWN)}")
        for one in suspects
    ]


def _name(where: Callable[[int], str], row: int) -> str:
    return safe_line(where(row))


def _quoted(examination: DeepExamination, row: int) -> str:
    text: Any = examination.texts.known(row)
    return safe_line(repr(text.answer or ""), SHOWN)


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
