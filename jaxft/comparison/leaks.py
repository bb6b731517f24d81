"""Held-out questions that nearly stand in training: every pair is compared, by words in a row."""

from collections import Counter
from collections.abc import Iterator, Sequence

from jaxft.data.deep.words import NEAR, NEAR_GRAM, grams_of, long_grams_of, template_grams, without, words_of

SAMPLE = 2_000  # training questions, beside the held-out ones, by which words of a template are known
Index = dict[str, list[int]]  # by n-gram, the numbers of the questions that have it


def near_leaks(train: Sequence[str], held_out: Sequence[str]) -> dict[int, int]:
    """By the number of a held-out question, that of the first training question that is nearly the same.

    Nearly: the sets of 5 words in a row have a Jaccard similarity of 0.8 or more, or 13 words in a row are the same;
    of both, those of a template are left out, which many questions share. Shorter questions are not compared.
    """
    sample = [*held_out, *train[:SAMPLE]]
    template = template_grams(map(_grams, sample), len(sample))
    long_template = template_grams(map(_long_grams, sample), len(sample))
    held_out_sets = [without(_grams(text), template) for text in held_out]
    by_gram, by_long_gram = _index(held_out_sets), _index([_long_grams(text) - long_template for text in held_out])
    leaks: dict[int, int] = {}
    for number, text in enumerate(train):
        own = without(_grams(text), template)
        for other, both in Counter(_numbers(by_gram, own)).items():
            if both >= NEAR * (len(own) + len(held_out_sets[other]) - both):
                leaks.setdefault(other, number)
        for other in _numbers(by_long_gram, _long_grams(text)):
            leaks.setdefault(other, number)
    return dict(sorted(leaks.items()))


def _grams(text: str) -> set[str]:
    words = words_of(text)
    return grams_of(words) if len(words) >= NEAR_GRAM else set()


def _long_grams(text: str) -> set[str]:
    return long_grams_of(words_of(text))


def _index(sets: Sequence[set[str]]) -> Index:
    out: Index = {}
    for number, grams in enumerate(sets):
        for gram in grams:
            out.setdefault(gram, []).append(number)
    return out


def _numbers(index: Index, grams: set[str]) -> Iterator[int]:
    """The numbers of the questions that have these n-grams, once for each that they have."""
    return (number for gram in grams for number in index.get(gram, ()))
