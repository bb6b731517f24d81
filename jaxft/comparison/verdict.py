"""The sentence that answers whether tuning was worth it, from the answers of both sides to the same rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxft.errors import ConfigError, counted
from jaxft.evaluation.statistics import (
    MOST_ROWS,
    Interval,
    Pairs,
    Standing,
    bca_interval,
    mcnemar,
    newcombe_interval,
    permutation_p,
    rows_needed,
    standing,
)

FEW_ROWS = 100  # training rows below which their number is the likeliest reason that tuning did not help
TOLERATED = 0.01  # share of leaked or contradictory rows that is passed over
Kind = Literal["data", "prompt", "tuning", "equal", "open", "one side"]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Two ways on the same N rows: the first one less the second.

    p: two-sided, exact McNemar or by drawn signs. rows_needed: about how many rows would tell, if these do not.
    """

    difference: float
    interval: Interval
    p: float
    standing: Standing
    pairs: Pairs | None
    rows: int
    rows_needed: int | None

    def summary(self) -> dict[str, Any]:
        """The entry of compare.json."""
        counts = {} if self.pairs is None else {
            "both": self.pairs.both, "only_first": self.pairs.only_first, "only_second": self.pairs.only_second,
            "neither": self.pairs.neither,
        }  # fmt: skip
        return {
            "difference": self.difference,
            "interval": list(self.interval),
            "p": self.p,
            "standing": self.standing,
            "rows_needed": self.rows_needed,
            **counts,
        }


def compare_values(
    first: Sequence[float],
    second: Sequence[float],
    *,
    passes: bool,
    margin: float,
    clusters: Sequence[Any] | None = None,
    tests: int = 1,
) -> Compared:
    """The difference of two ways, [N] each. passes: whether values are 0 or 1, for McNemar and Newcombe.

    clusters: of each row; the interval is then a bootstrap of clusters. tests: how many such intervals are looked at
    for the same question: each has the level 1 - 0.05 / tests, so that all of them hold with 95%.
    """
    from scipy.stats import norm

    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    d = a - b
    difference, variance = float(d.mean()), float(d.var())
    pairs = Pairs.of(a == 1, b == 1) if passes else None
    if pairs is not None:  # that no row disagrees yet does not say that none will
        variance = (pairs.discordant + 1) / (pairs.total + 2) - difference**2
    if pairs is not None and clusters is None:
        interval = newcombe_interval(pairs, float(norm.ppf(1 - 0.025 / tests)))
        p = mcnemar(pairs)
    else:
        bootstrapped = bca_interval(d, clusters=clusters, level=1 - 0.05 / tests)
        interval = (difference, difference) if bootstrapped is None else bootstrapped
        p = permutation_p(d) if np.any(d) else 1.0
    where = standing(interval, margin)
    needed = rows_needed(difference, variance, margin) if where == "open" else None
    return Compared(
        difference=difference, interval=interval, p=p, standing=where, pairs=pairs, rows=len(d), rows_needed=needed
    )


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of the question. name: of the way. value: its score. seconds: of a call alone; None if not measured."""

    name: str
    value: float
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Trainings:
    """How the scores of several trainings of one method lie."""

    count: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the sentence is made from.

    compared: the tuned side less the prompted one. trainings: of which the tuned side is the average; None for one
    training. passes: whether scores are shares. break_even: calls, `never` or None. trained: training rows. leaked:
    held-out rows that are in training; near: others that nearly are. contradictions: training rows with another answer
    to their question. falling: whether the held-out loss still fell when training ended; None if it is not known.
    forgot: what the probe found, a sentence; None if nothing.
    """

    prompt: Side
    tuned: Side
    compared: Compared
    margin: float
    passes: bool
    trained: int
    trainings: Trainings | None = None
    leaked: int = 0
    near: int = 0
    contradictions: int = 0
    break_even: float | str | None = None
    months: float | None = None
    falling: bool | None = None
    forgot: str | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The answer. kind: for programs. sentence: for people."""

    kind: Kind
    sentence: str


def judge(evidence: Evidence) -> Verdict:
    """The verdict. What is wrong with the data comes before all others, and what the model forgot behind all others."""
    verdict = _by_standing(evidence)
    forgot = "" if evidence.forgot is None else f" {evidence.forgot}"
    if (wrong := data_problem(evidence)) is not None:
        return Verdict(kind="data", sentence=f"Mend the data first: {wrong} As they are: {verdict.sentence}{forgot}")
    return Verdict(kind=verdict.kind, sentence=verdict.sentence + forgot)


def data_problem(evidence: Evidence) -> str | None:
    """What of the rows must be mended before their figures mean anything; None if nothing."""
    parts = []
    seen = evidence.leaked + evidence.near
    if seen > TOLERATED * evidence.compared.rows:
        nearly = f", {evidence.near:,} of them nearly" if evidence.near else ""
        parts.append(f"{seen:,} of {evidence.compared.rows:,} held-out questions are in the training set too{nearly}.")
    if evidence.contradictions > TOLERATED * evidence.trained:
        parts.append(
            f"{evidence.contradictions:,} of {evidence.trained:,} training rows have another answer to the same "
            "question elsewhere."
        )
    return " ".join(parts) or None


def _by_standing(evidence: Evidence) -> Verdict:
    compared, name = evidence.compared, evidence.prompt.name
    if compared.standing == "better":
        faster, average = _seconds_less(evidence), _average(evidence)
        return Verdict(
            kind="tuning",
            sentence=f"Tuning pays: {_change(evidence)} over the best prompt ({name}){average}, "
            f"{p_text(compared.p)}{faster}.{_from_calls(evidence, alone=False)}",
        )
    if compared.standing == "worse":
        return Verdict(
            kind="prompt",
            sentence=f"Do not tune with these rows: the best prompt ({name}) is ahead, tuning {_change(evidence)}"
            f"{_average(evidence)}, "
            f"{p_text(compared.p)}. {_reason(evidence)}",
        )
    if compared.standing == "equal":
        return Verdict(
            kind="equal",
            sentence=f"Prompts do: {name} reaches {share(evidence.prompt.value, evidence.passes)}, tuning "
            f"{share(evidence.tuned.value, evidence.passes)} ({_range(evidence)}){_average(evidence)}."
            f"{_from_calls(evidence, alone=True)}",
        )
    would = compared.rows_needed
    needed = f"more than {MOST_ROWS:,} would be needed" if would is None else f"about {_rounded(would)} would do"
    return Verdict(
        kind="open",
        sentence=f"Cannot be told with {counted(compared.rows, 'row')}: tuning {_change(evidence)}{_average(evidence)} "
        f"against the best prompt ({name}), and the margin is {points(evidence.margin, evidence.passes, sign=False)}; "
        f"{needed}.",
    )


def _change(evidence: Evidence) -> str:
    """`+41 points (31 to 50)`."""
    return f"{points(evidence.compared.difference, evidence.passes)} ({_range(evidence)})"


def _average(evidence: Evidence) -> str:
    """` on average of 3 trainings (37 % to 65 %)`, with their scores; empty for one training."""
    trainings = evidence.trainings
    if trainings is None:
        return ""
    low, high = share(trainings.low, evidence.passes), share(trainings.high, evidence.passes)
    return f" on average of {trainings.count} trainings ({low} to {high})"


def _range(evidence: Evidence) -> str:
    low, high = evidence.compared.interval
    if evidence.passes:
        return f"{_whole(100 * low)} to {_whole(100 * high)}"
    return f"{low:+.3g} to {high:+.3g}"


def _whole(value: float) -> str:
    rounded = round(value)
    return f"{rounded:+d}" if rounded else "0"


def points(value: float, passes: bool, *, sign: bool = True) -> str:
    """A difference: in points of a hundred if the scores are shares."""
    if not passes:
        return f"{value:+.3g}" if sign else f"{value:.3g}"
    number = f"{100 * value:+.0f}" if sign else f"{100 * value:g}"
    number = "0" if number in ("+0", "-0") else number
    return f"{number} point{'' if number in ('+1', '-1', '1') else 's'}"


def share(value: float, passes: bool) -> str:
    """A score: in percent if it is a share."""
    return f"{100 * value:.0f} %" if passes else f"{value:.3g}"


def p_text(p: float) -> str:
    """`p < 0.001` or `p = 0.03`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def _seconds_less(evidence: Evidence) -> str:
    if evidence.prompt.seconds is None or evidence.tuned.seconds is None:
        return ""
    less = evidence.prompt.seconds - evidence.tuned.seconds
    if abs(less) < 0.005:
        return ", in the same time a call"
    if _is_dearer_alone(evidence):
        return f", and {-less:.2g} s a call more if it comes alone"
    return f", and {abs(less):.2g} s a call {'less' if less > 0 else 'more'}"


def _is_dearer_alone(evidence: Evidence) -> bool:
    """Whether calls of the tuned model cost less side by side, as calls are priced, although one alone takes longer."""
    prompt, tuned = evidence.prompt.seconds, evidence.tuned.seconds
    cheaper = isinstance(evidence.break_even, float | int)
    return cheaper and prompt is not None and tuned is not None and tuned - prompt >= 0.005


def _from_calls(evidence: Evidence, *, alone: bool) -> str:
    """From how many calls training has paid for itself by cheaper calls. alone: whether that is all it gives."""
    calls = evidence.break_even
    if calls is None:
        return ""
    if isinstance(calls, str):
        return " Tuning never pays by cost." if alone else " Its calls cost no less, so it never pays by cost."
    months = "" if evidence.months is None else f", after {evidence.months:.2g} months"
    cheaper = "calls that are cheaper side by side" if _is_dearer_alone(evidence) else "cheaper calls"
    pays = "Tuning pays by cost alone" if alone else f"It has paid for itself by {cheaper}"
    return f" {pays} from {_rounded(calls)} calls{months}."


def _rounded(value: float) -> str:
    """A number of calls or rows with two digits that count."""
    digits = max(0, len(str(int(value))) - 2)
    return f"{int(round(value, -digits)):,}"


def _reason(evidence: Evidence) -> str:
    if evidence.contradictions:
        return f"Likeliest reason: contradictory rows ({evidence.contradictions:,})."
    if evidence.trained < FEW_ROWS:
        return f"Likeliest reason: few rows ({evidence.trained:,})."
    if evidence.falling:
        return "Likeliest reason: the held-out loss was still falling when training ended."
    return "The reason is not known: look at the rows that changed, and at the labels."


def parse_requirement(text: str) -> tuple[str, str, str]:
    """(first, sign, second) of `tuned>prompt`, `tuned>=prompt` or the like. Raises ConfigError for another form."""
    for sign in (">=", ">"):
        first, separator, second = (part.strip() for part in text.partition(sign))
        if separator and {first, second} == {"tuned", "prompt"}:
            return first, sign, second
    raise ConfigError(
        f"--require={text} is not understood: write tuned>prompt (better by the margin or more), tuned>=prompt (not "
        "worse by the margin), or with both sides the other way round"
    )


def is_met(requirement: tuple[str, str, str], compared: Compared, margin: float) -> bool:
    """Whether a requirement holds. compared: tuned less prompt."""
    first, sign, _ = requirement
    low, high = compared.interval
    if first == "prompt":
        low, high = -high, -low
    return low >= margin if sign == ">" else low > -margin
