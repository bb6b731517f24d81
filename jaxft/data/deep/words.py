"""Texts as words, and words as sets of n-grams that are compared."""

import functools
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from jaxft.files.strict_json import parse_json

# Scripts that are written without spaces: each character counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
# Signs of formulas and code are words, since "5 + 3" and "5 - 3" differ; marks of a sentence are not.
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[+\-*/=<>%&|^~#@$€£\\]")
_LETTERS_READ = 400  # of a text, to find its script
# Names in Unicode that belong to one way of writing.
_SAME_SCRIPT = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "IDEOGRAPHIC": "CJK", "FULLWIDTH": "LATIN", "MODIFIER": "LATIN"}

NEAR_GRAM = 5  # words of an n-gram by which texts are compared
LEAK_GRAM = 13  # words in a row that two texts hardly share by chance
NEAR = 0.8  # Jaccard similarity from which two texts are near duplicates
# n-grams that are in more rows than these belong to a template and say nothing about a row.
TEMPLATE_SHARE, TEMPLATE_ROWS = 0.05, 10


def collapsed(text: str) -> str:
    """The text in Unicode's form NFKC, with one space for any white space: what two exact duplicates share."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def words_of(text: str) -> list[str]:
    """The words of a text, without upper case, accents of width, and marks of a sentence."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def grams_of(words: Sequence[str], size: int = NEAR_GRAM) -> set[str]:
    """The n-grams of words; of a shorter text, all of its words as one. Empty for a text without words."""
    if not words:
        return set()
    return {" ".join(words[start : start + size]) for start in range(max(1, len(words) - size + 1))}


def long_grams_of(words: Sequence[str]) -> set[str]:
    """The n-grams of LEAK_GRAM words; none of a shorter text."""
    return grams_of(words, LEAK_GRAM) if len(words) >= LEAK_GRAM else set()


def jaccard(first: set[str], second: set[str]) -> float:
    """Shared elements as a share of all elements of two sets, from 0 to 1; 0 if both are empty."""
    both = len(first & second)
    return both / (len(first) + len(second) - both) if both else 0.0


def without(grams: set[str], template: frozenset[str]) -> set[str]:
    """The n-grams that are not of a template; all of them if nothing else is left."""
    return (grams - template) or grams


def template_grams(sets: Iterable[set[str]], rows: int) -> frozenset[str]:
    """The n-grams that are in more than a twentieth of `rows` sets, and in more than 10: a template that rows share."""
    counts = Counter(gram for grams in sets for gram in grams)
    least = max(TEMPLATE_ROWS, TEMPLATE_SHARE * rows)
    return frozenset(gram for gram, count in counts.items() if count > least)


def digest(*texts: str) -> int:
    """A 64-bit hash of texts, the same in every process. 0 is never one."""
    data = "\0".join(texts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


def canonical(answer: str) -> str:
    """What two answers share that say the same: the JSON value if they are JSON, else their words."""
    value = json_of(answer)
    if isinstance(value, dict | list):
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    return " ".join(words_of(answer)) or collapsed(answer)


def json_of(text: str) -> object:
    """The value of strict JSON text that is an object or a list; None for any other text."""
    if text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        return parse_json(text.strip(), finite=True)
    except (ValueError, RecursionError):
        return None


def script_of(text: str) -> str | None:
    """The script of most letters of a text, by its name in Unicode such as LATIN; None without letters."""
    letters = [char for char in text[: 4 * _LETTERS_READ] if char.isalpha()][:_LETTERS_READ]
    counts = Counter(_script_of_letter(letter) for letter in letters)
    return counts.most_common(1)[0][0] if counts else None


@functools.lru_cache(maxsize=4096)
def _script_of_letter(letter: str) -> str:
    name = unicodedata.name(letter, "UNKNOWN").split()[0].split("-")[0]
    return _SAME_SCRIPT.get(name, name)
