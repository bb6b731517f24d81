"""Answers that seem cut off."""

from jaxft.data.deep.words import json_of

PROSE = 200  # characters from which the end of a text says whether it was cut
ENDS = frozenset(".!?:;)]}>\"'`*_~|\u3002\uff01\uff1f\u300d\u300f\u201d\u2019\u2026\u060c\u061f\u0964")
CUTS = ("a code block is not closed", "JSON ends before it is closed", "it ends within a sentence")
FENCE, JSON, SENTENCE = range(3)


def is_cut(answer: str) -> int:
    """Why an answer seems cut off, as an index of CUTS; -1 if it does not. SENTENCE is odd only if few end like it."""
    text = answer.strip()
    if text.count("```") % 2:
        return FENCE
    if text[:1] in ("{", "[") and text.count(text[0]) > text.count("}" if text[0] == "{" else "]"):
        return JSON if json_of(text) is None else -1
    return SENTENCE if len(text) >= PROSE and text[-1] not in ENDS and json_of(text) is None else -1
