"""Scores by generation on held-out rows: the answers, what is right of them, and the files that keep both."""

from jaxft.runs.scores.answers import AnsweredRow, AnswersFile, answers_key
from jaxft.runs.scores.scoring import Answers, Kept, answer, check_scores, samples, score_summary, scores_key, scores_of

__all__ = [
    "AnsweredRow",
    "Answers",
    "AnswersFile",
    "Kept",
    "answer",
    "answers_key",
    "check_scores",
    "samples",
    "score_summary",
    "scores_key",
    "scores_of",
]
