"""One pass over all rows: hashes, lengths and signatures as columns, so that no text stays in memory."""

# N rows, K values of a signature

from dataclasses import dataclass, field

import numpy as np

from jaxft.data.deep.cuts import is_cut
from jaxft.data.deep.minhash import empty_signatures, library, signatures_of
from jaxft.data.deep.texts import READ, RowText, Texts
from jaxft.data.deep.words import (
    canonical,
    collapsed,
    digest,
    grams_of,
    long_grams_of,
    script_of,
    template_grams,
    without,
    words_of,
)

SAMPLE = 2_000  # rows in which templates are looked for
CHUNK = 1_000  # rows whose signatures are made at once
NONE = 0  # hash of a text that a row does not have
SHORT = 5  # words: a shorter question is the same only after the same messages


@dataclass(frozen=True, kw_only=True)
class Templates:
    """The n-grams of templates that many rows share: of questions, of whole rows, and long ones of questions."""

    user: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()
    long: frozenset[str] = frozenset()

    def user_grams(self, text: RowText) -> set[str]:
        """The n-grams by which the question of a row is compared."""
        return without(grams_of(words_of(text.user or "")), self.user)

    def whole_grams(self, text: RowText) -> set[str]:
        """The n-grams by which a row is compared as a whole."""
        return without(grams_of(words_of(text.whole)), self.whole)

    def long_grams(self, text: RowText) -> set[str]:
        """The long n-grams of the question of a row."""
        return long_grams_of(words_of(text.user or "")) - self.long


@dataclass(kw_only=True)
class Table:
    """Columns of all rows, training rows first, [N] each; 0 stands for a text that a row does not have.

    before, user, answer, rejected, whole: hashes, uint64; `answer` of what the answer says, whatever its white space.
    short: whether the question has fewer than 5 words. lengths: of question and answer in characters, int32 [N, 2], -1
    for none. scripts: of question and answer, as indices of script_names, int16 [N, 2], -1 for none. cut: why the
    answer seems cut off, as an index of `cuts.CUTS`, -1 for not. label: -1 for none. user_signatures, signatures:
    uint32 [N, K] of questions and of whole rows. problems: what is wrong with rows that cannot be read. left_out: rows
    that give no example.
    """

    train: int
    templates: Templates
    before: np.ndarray
    user: np.ndarray
    answer: np.ndarray
    rejected: np.ndarray
    whole: np.ndarray
    short: np.ndarray
    lengths: np.ndarray
    scripts: np.ndarray
    cut: np.ndarray
    label: np.ndarray
    user_signatures: np.ndarray
    signatures: np.ndarray
    script_names: list[str] = field(default_factory=list)
    problems: dict[int, str] = field(default_factory=dict)
    left_out: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.whole)

    @property
    def is_train(self) -> np.ndarray:
        """Whether a row is a training row, bool [N]."""
        return np.arange(len(self)) < self.train


def read_table(texts: Texts) -> Table:
    """The table of all rows. Rows that cannot be read are in `problems`."""
    table = _empty(len(texts), texts.train, find_templates(texts))
    name = library()
    for start in range(0, len(texts), CHUNK):
        read: dict[int, RowText] = {}
        for index in range(start, min(start + CHUNK, len(texts))):
            try:
                text = texts[index]
            except READ as error:
                table.problems[index] = str(error)
                continue
            if text is None:
                table.left_out.append(index)
                continue
            read[index] = text
            _fill(table, index, text)
        _sign(table, read, name)
    return table


def find_templates(texts: Texts) -> Templates:
    """The n-grams of templates, from up to 2,000 different training rows spread over all of them."""
    user, whole, long = [], [], []
    seen: set[str] = set()
    for index in np.linspace(0, max(texts.train - 1, 0), min(SAMPLE, texts.train), dtype=np.int64).tolist():
        try:
            text = texts[index]
        except READ:
            continue
        if text is None or text.whole in seen:
            continue
        seen.add(text.whole)
        words = words_of(text.user or "")
        user.append(grams_of(words))
        long.append(long_grams_of(words))
        whole.append(grams_of(words_of(text.whole)))
    user_grams, whole_grams, long_grams = (template_grams(sets, len(seen)) for sets in (user, whole, long))
    return Templates(user=user_grams, whole=whole_grams, long=long_grams)


def _empty(rows: int, train: int, templates: Templates) -> Table:
    before, user, answer, rejected, whole = (np.zeros(rows, np.uint64) for _ in range(5))
    return Table(
        train=train,
        templates=templates,
        before=before,
        user=user,
        answer=answer,
        rejected=rejected,
        whole=whole,
        short=np.zeros(rows, bool),
        lengths=np.full((rows, 2), -1, np.int32),
        scripts=np.full((rows, 2), -1, np.int16),
        cut=np.full(rows, -1, np.int8),
        label=np.full(rows, -1, np.int8),
        user_signatures=empty_signatures(rows),
        signatures=empty_signatures(rows),
    )


def _fill(table: Table, index: int, text: RowText) -> None:
    user, answer = text.user, text.answer
    table.before[index] = digest(collapsed(text.before))
    table.user[index] = NONE if user is None else digest(collapsed(user))
    table.answer[index] = NONE if answer is None else digest(canonical(answer))
    table.rejected[index] = NONE if text.rejected is None else digest(canonical(text.rejected))
    label = "" if text.label is None else str(text.label)
    parts = (text.before, user or "", answer or "", text.rejected or "", label)
    table.whole[index] = digest(*map(collapsed, parts))
    table.short[index] = user is not None and len(words_of(user)) < SHORT
    for column, one in enumerate((user, answer)):
        table.lengths[index, column] = -1 if one is None else len(one.strip())
        script = None if one is None else script_of(one)
        if script is not None:
            table.scripts[index, column] = _number(table.script_names, script)
    table.cut[index] = -1 if answer is None else is_cut(answer)
    table.label[index] = -1 if text.label is None else int(text.label)


def _number(names: list[str], name: str) -> int:
    if name not in names:
        names.append(name)
    return names.index(name)


def _sign(table: Table, read: dict[int, RowText], name: str) -> None:
    """Writes the signatures of a chunk of rows."""
    for signatures, grams_by_row in (
        (table.user_signatures, {i: table.templates.user_grams(text) for i, text in read.items() if text.user}),
        (table.signatures, {i: table.templates.whole_grams(text) for i, text in read.items()}),
    ):
        rows = [index for index, grams in grams_by_row.items() if grams]
        if rows:
            signatures[rows] = signatures_of([grams_by_row[index] for index in rows], name)
