"""Prints what a deep examination found: a line for each check, and the first rows of each finding."""

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


def print_deep(found: DeepExamination, console: "Console", rows: int) -> None:
    """Prints the findings. rows: how many of each are named; JSON has all."""
    texts = found.texts
    say(
        console,
        f"{counted(texts.train, 'training row')}, {counted(len(texts) - texts.train, 'held-out row')}",
        style="bold",
    )
    for title, lines in _sections(found):
        say(console, title, style="yellow" if lines else "")
        for line in lines[:rows]:
            say(console, f"  {line}")
        if len(lines) > rows:
            say(console, f"  and {len(lines) - rows:,} more (--json has all, --rows=N shows N)")
    dropped = Counter(found.dropped().values())
    say(console, f"rows that --write=FILE leaves out: {_counts(dropped) or 'none'}")


def _sections(found: DeepExamination) -> Iterator[tuple[str, list[str]]]:
    yield (
        "cannot be read: " + counted(len(found.problems), "row"),
        [safe_line(text) for text in found.problems.values()],
    )
    yield _duplicates("duplicate questions", found, found.questions)
    yield _duplicates("duplicate rows", found, found.whole)
    yield _leaks(found)
    yield _contradictions(found)
    kinds = Counter(odd.kind for odd in found.odd)
    yield f"odd shapes: {_counts(kinds) or 'none'}", [_odd(found, odd) for odd in _alternating(found.odd)]
    for balance in found.balances:
        yield _balance(balance)
    if found.suspects is not None:
        yield _suspects(found)


def _duplicates(what: str, found: DeepExamination, pairs: Duplicates) -> tuple[str, list[str]]:
    share = len(pairs.rows) / max(found.texts.train, 1)
    title = f"{what}: {len(pairs.exact):,} exact, {len(pairs.near):,} near ({share:.1%} of the rows)"
    where = found.texts.where
    return title, [
        f"{_name(where, pair.second)} repeats {_name(where, pair.first)} ({pair.similarity:.2f})"
        for pair in (*pairs.exact, *pairs.near)
    ]


def _leaks(found: DeepExamination) -> tuple[str, list[str]]:
    kinds = Counter(leak.kind for leak in found.leaks)
    held_out = len({leak.held_out for leak in found.leaks})
    total = len(found.texts) - found.texts.train
    title = f"leaks: {held_out:,} of {counted(total, 'held-out row')} in training rows"
    return title + (f" ({_counts(kinds)})" if kinds else ""), [
        f"{_name(found.texts.where, leak.train)} shows {_name(found.texts.where, leak.held_out)}: "
        + ("13 words in a row" if leak.similarity is None else f"{leak.kind}, {leak.similarity:.2f}")
        for leak in found.leaks
    ]


def _contradictions(found: DeepExamination) -> tuple[str, list[str]]:
    where = found.texts.where
    return f"contradictions: {counted(len(found.contradictions), 'pair')}", [
        f"{_name(where, one.first)} and {_name(where, one.second)} ask the same ({one.similarity:.2f}): "
        f"{_quoted(found, one.first)} and {_quoted(found, one.second)}"
        for one in found.contradictions
    ]


def _odd(found: DeepExamination, odd: Odd) -> str:
    return f"{_name(found.texts.where, odd.row)}: {safe_line(odd.text)}"


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


def _suspects(found: DeepExamination) -> tuple[str, list[str]]:
    suspects = found.suspects or []
    return f"answers that may be wrong: the likeliest {len(suspects):,}", [
        f"{_name(found.texts.where, one.row)}: {safe_line(repr(one.answer), SHOWN)}, {one.loss:.2f} nats per token "
        f"({one.excess:+.2f})"
        + ("" if one.model is None else f"; the model answers {safe_line(repr(one.model), SHOWN)}")
        for one in suspects
    ]


def _name(where: Callable[[int], str], row: int) -> str:
    return safe_line(where(row))


def _quoted(found: DeepExamination, row: int) -> str:
    text: Any = found.texts.known(row)
    return safe_line(repr(text.answer or ""), SHOWN)


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
