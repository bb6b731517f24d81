"""Examines a tokenised set before training: counts what it contains and refuses what would train silently wrong."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxft.config import DataConfig
from jaxft.data.batch import Example
from jaxft.data.chat.arrange import CHANGES
from jaxft.data.chat.encode import SPLIT_FROM, SPLIT_TO, WHOLE_WITH
from jaxft.data.encoded.table import Facts, facts_of, hashes_of
from jaxft.data.encoded.work import ReadCounts
from jaxft.data.examine_pairs import PairExamination, combine_pairs, examine_pairs, length_quantiles, pair_warnings
from jaxft.data.packing import plan_of
from jaxft.data.rows.columns import UnreadColumn, combine_unread
from jaxft.data.truncation import LengthLimit, ModelLimits
from jaxft.errors import DataError, counted, listed

BINS = 12
NAMED = 10  # rows named in one error


@dataclass(frozen=True, kw_only=True)
class Examination:
    """Counts of a tokenised set. Lengths are in tokens.

    rows: rows read. examples: examples kept; a row has several if its answers cannot share a sequence. truncated,
    dropped: examples that were longer than max_length. windowed: examples that were cut into windows; windows: how many
    these are, counted among the examples. sequences: training sequences of max_length tokens that the examples fill;
    fill: the share of their positions that is not padding. quantiles: of the lengths of all examples,
    before truncation, by "p0" to "p100". histogram: of the same lengths, as (from, to, examples), bounds inclusive.
    formats: rows of each format. holds: rows with a system message, several answers, tools, tool calls, thoughts,
    answers that are not trained. pairs: what differs between chosen and rejected answers, if the examples are pairs.
    skipped: rows that cannot be trained on and were left out (data.bad_rows); bad_rows: what is wrong with the first.
    unread: columns, and keys of messages, that nothing reads.
    """

    source: str
    rows: int
    examples: int
    tokens: int
    trained_tokens: int
    max_length: int
    truncated: int
    dropped: int
    sequences: int
    fill: float
    quantiles: dict[str, int]
    histogram: tuple[tuple[int, int, int], ...]
    formats: dict[str, int]
    holds: dict[str, int] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    pairs: PairExamination | None = None
    windowed: int = 0
    windows: int = 0
    skipped: int = 0
    bad_rows: tuple[str, ...] = ()
    unread: tuple[UnreadColumn, ...] = ()

    @property
    def before_fitting(self) -> int:
        """Examples before the long ones were dropped or cut into windows."""
        return self.examples + self.dropped - self.windows + self.windowed

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `data.json` and --json; without `pairs` if there are none."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "pairs" or value is not None}


def examine(
    examples: Sequence[Example],
    config: DataConfig,
    *,
    model: ModelLimits,
    where: Callable[[int], str],
    source: str = "the data",
    counts: ReadCounts | None = None,
    pairs: bool = False,
) -> tuple[Sequence[Example], Examination]:
    """The examples that can be trained on, in order and none longer than max_length, and their examination.

    config: its max_length, packing, and truncation: what to do with longer examples. model: what it says about tokens
    and lengths. where: the name of a row in errors, from its index. counts: of the reading. pairs: whether every
    example is a chosen and a rejected answer.
    Raises DataError if the set is empty, examples are too long and truncation is `refuse`, rows train on zero tokens,
    or no example trains its end token.
    """
    counts = counts or ReadCounts()
    if not examples:
        raise DataError(_nothing(source, counts.left_out))
    max_length, facts = config.max_length, facts_of(examples)
    rows = int(np.count_nonzero(np.diff(np.sort(facts.rows)))) + 1 + counts.left_out["rows"]
    _refuse_untrained(facts, rows, where, source)
    limit = LengthLimit(
        config=config, model=model, source=source, where=where, pairs=pairs, chats=bool(counts.chats.total())
    )
    fitted = limit.fit(examples, facts.lengths)
    kept = fitted.examples
    kept_facts = facts if kept is examples else facts_of(kept)
    ended = int(np.isin(kept_facts.ends, sorted(model.stop_ids)).sum())
    if not ended:
        raise DataError(
            f"EOS is never trained: {source} gives {counted(len(kept), 'example')}, and none ends in a trained end "
            f"token, so the model would not learn to stop. {fitted.truncated:,} were cut at "
            f"data.max_length={max_length}: raise it, or set data.truncation to 'left' or 'drop'."
        )
    plan = plan_of(kept, max_length, packing=config.packing)
    tokens = int(kept_facts.lengths.sum())
    examination = Examination(
        source=source,
        rows=rows,
        examples=len(kept),
        tokens=tokens,
        trained_tokens=int(kept_facts.trained.sum()),
        max_length=max_length,
        truncated=fitted.truncated,
        dropped=fitted.dropped,
        windowed=fitted.windowed,
        windows=fitted.windows,
        sequences=len(plan),
        fill=tokens / (len(plan) * max_length),
        quantiles=length_quantiles(facts.lengths),
        histogram=histogram(facts.lengths),
        pairs=examine_pairs(kept, counts.left_out) if pairs else None,
        **counts.fields(),
    )
    warnings = _warnings(examination, len(kept) - ended, counts.notes, fitted.headless)
    return kept, dataclasses.replace(examination, warnings=warnings)


def combine_examinations(examinations: Sequence[Examination], examples: Sequence[Example], what: str) -> Examination:
    """One examination of several sets, each of which is packed by itself; a single set keeps its own.

    examples: the kept ones of all sets; quantiles and histogram are of these, after truncation. what: a name for all
    sets, such as `training sets`.
    """
    first = examinations[0]
    if len(examinations) == 1:
        return first

    def total(name: str) -> int:
        return sum(getattr(one, name) for one in examinations)

    def count_by(name: str) -> dict[str, int]:
        return dict(sum((Counter(getattr(one, name)) for one in examinations), Counter()))

    lengths = facts_of(examples).lengths
    summed = (
        "rows", "examples", "tokens", "trained_tokens", "truncated", "dropped", "windowed", "windows", "sequences",
        "skipped",
    )  # fmt: skip
    sums = {name: total(name) for name in summed}
    return Examination(
        source=f"{len(examinations)} {what}",
        max_length=first.max_length,
        fill=sums["tokens"] / (sums["sequences"] * first.max_length),
        quantiles=length_quantiles(lengths),
        histogram=histogram(lengths),
        formats=count_by("formats"),
        holds=count_by("holds"),
        warnings=tuple(f"{one.source}: {warning}" for one in examinations for warning in one.warnings),
        pairs=combine_pairs([one.pairs for one in examinations if one.pairs], examples),
        bad_rows=tuple(message for one in examinations for message in one.bad_rows),
        unread=combine_unread([one.unread for one in examinations]),
        **sums,
    )


def count_repeated(train: Sequence[Example], held_out: Sequence[Example]) -> int:
    """How many held-out examples are in train too, token for token."""
    return int(np.isin(hashes_of(held_out), hashes_of(train)).sum())


def _refuse_untrained(facts: Facts, rows: int, where: Callable[[int], str], source: str) -> None:
    silent = [where(row) for row in facts.rows[facts.trained == 0].tolist()]
    if silent:
        raise DataError(
            f"{len(silent):,} of {counted(rows, 'row')} of {source} train on zero tokens: {listed(silent, NAMED)}. "
            "Every answer in them is empty or marked not to be trained (train: false, weight: 0): remove these rows, "
            "or the marks."
        )


def _warnings(examination: Examination, unended: int, notes: Counter[str], headless: int) -> tuple[str, ...]:
    warnings = []
    if notes["split"]:
        warnings.append(_cost_of_splits(examination, notes))
    warnings += changes(notes, examination.skipped)
    for what, count in notes.items():
        if what not in ("split", SPLIT_FROM, SPLIT_TO, *CHANGES) and not what.startswith(WHOLE_WITH):
            warnings.append(f"in {counted(count, 'row')} the chat template leaves {what} out (data.omissions)")
    if examination.dropped:
        warnings.append(
            f"{counted(examination.dropped, 'example', 'is', 'are')} longer than {examination.max_length} tokens and "
            "dropped"
        )
    if examination.truncated:
        warnings.append(
            f"{counted(examination.truncated, 'example', 'is', 'are')} longer than {examination.max_length} tokens and "
            "cut"
        )
    if headless:
        warnings.append(
            f"{counted(headless, 'example', 'begins', 'begin')} within an answer, which alone is longer than "
            f"{examination.max_length} tokens"
        )
    unended -= examination.windows - examination.windowed  # only the last window of a text ends as the text does
    if unended:
        warnings.append(f"{counted(unended, 'example', 'does', 'do')} not end in a trained end token")
    if examination.fill < 0.5 and examination.sequences > 1:
        longest = examination.quantiles["p100"]
        warnings.append(
            f"{1 - examination.fill:.0%} of every batch is padding: set data.packing=True, or data.max_length nearer "
            f"the longest row ({longest} tokens)"
        )
    if len(examination.formats) > 1:
        mixed = ", ".join(f"{count:,} {name}" for name, count in examination.formats.items())
        warnings.append(f"rows are of several formats ({mixed})")
    if examination.pairs is not None:
        warnings += pair_warnings(examination.pairs)
    return tuple(warnings)


def _cost_of_splits(examination: Examination, notes: Counter[str]) -> str:
    before, after = notes[SPLIT_FROM], notes[SPLIT_TO]
    names = [note.removeprefix(WHOLE_WITH) for note in notes if note.startswith(WHOLE_WITH)]
    mend = f"; data.chat_template={names[0]!r} keeps such rows whole" if names else ""
    return (
        f"{counted(notes['split'], 'row', 'is', 'are')} cut into a sequence for each answer that the chat template "
        f"rewrites later: {counted(examination.rows, 'row')} became {examination.before_fitting:,} examples, and the "
        f"{before:,} tokens of those that are cut {after:,}, {after / max(before, 1):.1f} times as many "
        f"(data.turns){mend}"
    )


def changes(notes: Counter[str], skipped: int) -> list[str]:
    """Warnings of rows that were left out, and of those whose messages were changed for the chat template."""
    warnings = [f"left out, as data.bad_rows says: {counted(skipped, 'row')}"] if skipped else []
    return warnings + [f"in {counted(notes[change], 'row')} {change}" for change in CHANGES if notes[change]]


def _nothing(source: str, left_out: Counter[str]) -> str:
    rows = left_out["rows"]
    if not rows:
        return f"{source} has no rows, so there is nothing to train on"
    return (
        f"none of the {rows:,} rows of {source} has two answers that differ and are ranked differently, so there is "
        "nothing to prefer. Check data.answers_field and data.score_field."
    )


def histogram(lengths: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """`Examination.histogram` of these lengths, in at most BINS bins."""
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // BINS))
    counts = np.bincount((lengths - low) // width)
    return tuple((low + i * width, low + (i + 1) * width - 1, int(count)) for i, count in enumerate(counts))
