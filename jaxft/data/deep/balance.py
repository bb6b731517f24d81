"""The commonest answers, or values of their fields, in training and in held-out rows."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from jaxft.data.deep.words import canonical, json_of

MOST_VALUES = 200  # different values beyond which answers are no list
SHOWN = 5
SHIFT = 3.0  # ratio of two shares beyond which the sets differ
LEAST = 5  # rows of a value, on average and in one of the sets, below which it is left out
CHANCE = 0.001  # p-value of Fisher's exact test above which a shift may be chance
LONGEST = 80  # characters of a value of a list
WHOLE = "answer"


@dataclass(frozen=True, kw_only=True)
class Share:
    """A value and the share of the rows that have it. train, held_out: from 0 to 1; held_out is None without rows."""

    value: str
    train: float
    held_out: float | None
    shifted: bool


@dataclass(frozen=True, kw_only=True)
class Balance:
    """The commonest values of a field, and those whose shares differ by more than 3 to 1. name: `answer`, or a key."""

    name: str
    values: int
    commonest: tuple[Share, ...]
    shifted: tuple[Share, ...]


@dataclass
class Counts:
    """How often each value of each field occurs. closed: fields with too many values, which are left out."""

    rows: int = 0
    values: dict[str, Counter[str]] = field(default_factory=dict)
    open: set[str] = field(default_factory=set)

    def add(self, answer: str) -> None:
        """Counts an answer, and the fields of one that is a JSON object."""
        self.rows += 1
        for name, value in _values(answer):
            if name in self.open:
                continue
            counts = self.values.setdefault(name, Counter())
            counts[value] += 1
            if len(counts) > MOST_VALUES or len(value) > LONGEST:
                self.open.add(name)
                del self.values[name]


def balances(train: Iterable[str], held_out: Iterable[str]) -> list[Balance]:
    """The balance of the answers, and of each field of JSON answers, that has few values. Others are left out."""
    counts = Counts(), Counts()
    for own, answers in zip(counts, (train, held_out), strict=True):
        for answer in answers:
            own.add(answer)
    names = [name for name in counts[0].values if name not in counts[1].open]
    return [_balance(name, *counts) for name in names if len(counts[0].values[name]) <= counts[0].rows / LEAST]


def _balance(name: str, train: Counts, held_out: Counts) -> Balance:
    own, other = train.values[name], held_out.values.get(name, Counter[str]())
    shares = [_share(value, own, other, train.rows, held_out.rows) for value, _ in (own + other).most_common()]
    by_training = sorted(shares, key=lambda share: -share.train)
    shifted = tuple(share for share in shares if share.shifted)
    return Balance(name=name, values=len(own), commonest=tuple(by_training[:SHOWN]), shifted=shifted)


def _share(value: str, own: Counter[str], other: Counter[str], rows: int, held_out: int) -> Share:
    train = own[value] / rows
    if not held_out:
        return Share(value=value, train=train, held_out=None, shifted=False)
    share = other[value] / held_out
    shifted = max(own[value], other[value]) >= LEAST and max(train, share) > SHIFT * min(train, share)
    if shifted:
        from scipy.stats import fisher_exact  # imported only where shares differ

        table = [[own[value], rows - own[value]], [other[value], held_out - other[value]]]
        shifted = bool(fisher_exact(table).pvalue < CHANCE)
    return Share(value=value, train=train, held_out=share, shifted=shifted)


def _values(answer: str) -> Iterator[tuple[str, str]]:
    yield WHOLE, canonical(answer)
    value = json_of(answer)
    if isinstance(value, dict):
        for name, one in value.items():
            if one is None or isinstance(one, str | int | float | bool):
                yield f"{WHOLE}.{name}", one if isinstance(one, str) else json.dumps(one)
