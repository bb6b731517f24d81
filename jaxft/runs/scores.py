"""Scores by generation on held-out rows, with samples."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.config import EvalConfig
from jaxft.data import Prepared, Tokenizer
from jaxft.data.chat.reasoning import split_thoughts
from jaxft.evaluation.scoring import Score, json_fields, score
from jaxft.generation.settings import Sampling
from jaxft.generation.tokens import generate_tokens
from jaxft.nn.decoder import Decoder

SAMPLES = 6


@dataclass(frozen=True)
class Answers:
    """A score and the scored texts."""

    score: Score
    texts: tuple[str, ...]


def answer(module: Decoder, tokenizer: Tokenizer, data: Prepared, config: EvalConfig, metric: str) -> Answers:
    """Greedy answers to the held-out prompts, scored by a metric without their thoughts."""
    done = generate_tokens(
        module,
        data.eval_prompts,
        sampling=Sampling(max_new_tokens=config.max_new_tokens),
        stop_ids=tokenizer.stop_ids,
        slots=min(config.batch_size, len(data.eval_prompts)),
    )
    texts = tuple(split_thoughts(tokenizer.decode(row.tokens))[1] for row in done)
    return Answers(score(metric, texts, data.eval_references), texts)


def scores_key(data: Prepared, config: EvalConfig) -> str:
    """A digest of all that scores depend on beside the model: the held-out prompts and the settings."""
    request = [data.eval_prompts, data.eval_references, config.metric, config.max_new_tokens]
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()


def score_summary(answers: Answers, references: Sequence[str]) -> dict[str, Any]:
    """The entry of one set of answers in scores.json and --json."""
    out: dict[str, Any] = {"correct": answers.score.correct, "total": answers.score.total, "value": answers.score.value}
    if answers.score.metric.startswith("json"):
        out["fields"] = json_fields(answers.texts, references)
    return out


def samples(tokenizer: Tokenizer, data: Prepared, base: Sequence[str], tuned: Answers) -> list[dict[str, Any]]:
    """A few prompts with the reference and the answers before and after training, right and wrong ones."""
    order = sorted(range(len(tuned.texts)), key=lambda i: tuned.score.per_row[i])
    wrong = [i for i in order if not tuned.score.per_row[i]][: SAMPLES // 2]
    right = [i for i in order if tuned.score.per_row[i]][: SAMPLES - len(wrong)]
    return [
        {
            "prompt": tokenizer.decode(data.eval_prompts[i]),
            "reference": data.eval_references[i],
            "base": base[i] if i < len(base) else "",
            "tuned": tuned.texts[i],
            "correct": tuned.score.per_row[i],
        }
        for i in right + wrong
    ]
